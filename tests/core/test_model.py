"""CrossFlow: velocities, condition encoder, parameter counts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from crossflow.core.batch import Condition
from crossflow.core.model import CrossFlow, as_flags
from crossflow.core.source import SourceEncoder


class TwoStages(nn.Module):
    def forward(self, z_t: Tensor, t: Tensor, unconditional: Tensor, condition: Condition | None) -> list[Tensor]:
        return [z_t[..., ::2, ::2], 2 * z_t]


class Project(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 6)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        return self.linear(features)


def test_velocity_is_the_finest_of_the_velocities() -> None:
    model, z = CrossFlow(SourceEncoder(None, "gaussian", (1, 4, 4)), TwoStages()), torch.randn(2, 1, 4, 4)
    t, flags = torch.zeros(2), as_flags(False, z)
    assert [v.shape[-1] for v in model.velocities(z, t, flags)] == [2, 4]
    assert torch.equal(model.velocity(z, t, flags), 2 * z)


def test_condition_encoder_turns_tokens_and_leaves_the_rest() -> None:
    model = CrossFlow(SourceEncoder(None, "gaussian", (1, 4, 4)), TwoStages(), Project())
    mask, grid = torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 1, 4, 4)
    encoded = model.encode_condition(Condition(torch.randn(2, 5, 3), mask, grid))
    assert encoded is not None
    assert encoded.tokens is not None
    assert encoded.tokens.shape == (2, 5, 6)
    assert encoded.mask is mask
    assert encoded.grid is grid
    only_grid = Condition(grid=grid)
    assert model.encode_condition(only_grid) is only_grid
    assert model.encode_condition(None) is None


def test_parameters_are_counted_by_part(tiny_dit: Callable) -> None:
    backbone = tiny_dit((1, 4, 4), context_dim=6)
    model = CrossFlow(SourceEncoder(nn.Linear(2, 3), "variational", (1, 4, 4)), backbone, Project())
    counts = model.num_parameters()
    assert counts["source encoder"] == 9
    assert counts["condition encoder"] == 24
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_flags_repeat_a_value_for_each_sample() -> None:
    flags = as_flags(True, torch.zeros(3, 2))
    assert flags.dtype == torch.bool
    assert flags.tolist() == [True] * 3
