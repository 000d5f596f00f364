"""The time-reversed flow: its velocity, and that it takes an end back to its start."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from crossflow.core.backbones.time_reversal import TimeReversal
from crossflow.core.batch import Condition
from crossflow.core.model import CrossFlow
from crossflow.core.sampling import generate
from crossflow.core.source import SourceEncoder

LATENT = (2, 4, 4)


class Records(nn.Module):
    """Returns two velocities, and keeps its inputs."""

    def forward(self, z_t: Tensor, t: Tensor, unconditional: Tensor, condition: Condition | None) -> list[Tensor]:
        self.inputs = (z_t, t, unconditional, condition)
        return [z_t[..., ::2, ::2], 3 * z_t]


def test_velocity_is_minus_that_of_the_backbone_at_the_mirrored_time() -> None:
    backbone, z, t = Records(), torch.randn(3, *LATENT), torch.tensor([0.0, 0.25, 1.0])
    flags, condition = torch.tensor([True, False, True]), Condition(grid=torch.zeros(3, 1, 4, 4))
    coarse, fine = TimeReversal(backbone)(z, t, flags, condition)
    assert torch.equal(coarse, -z[..., ::2, ::2])
    assert torch.equal(fine, -3 * z)
    assert torch.equal(backbone.inputs[1], torch.tensor([1.0, 0.75, 0.0]))
    assert backbone.inputs[0] is z
    assert backbone.inputs[2] is flags
    assert backbone.inputs[3] is condition


@torch.no_grad()
def test_the_reversed_flow_returns_from_the_end_to_the_start(tiny_dit: Callable) -> None:
    source, backbone = SourceEncoder(None, "gaussian", LATENT), tiny_dit(LATENT, time_scale=1.0)
    forwards, backwards = CrossFlow(source, backbone), CrossFlow(source, TimeReversal(backbone))
    z0 = torch.randn(3, *LATENT)
    z1 = generate(forwards, z0, solver="rk4", steps=20)
    assert (z1 - z0).abs().max() > 0.1
    assert torch.allclose(generate(backwards, z1, solver="rk4", steps=20), z0, atol=1e-4)


def test_checkpointing_is_that_of_the_backbone(tiny_dit: Callable) -> None:
    backbone = tiny_dit(LATENT)
    TimeReversal(backbone).set_checkpointing(True)
    assert backbone._checkpointing
