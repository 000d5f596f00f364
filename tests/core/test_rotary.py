"""Rotary positions: attention depends on differences of places, and places far apart do not attend."""

import pytest
import torch

from crossflow.core.backbones.dit import DiT, Size
from crossflow.core.config import BackboneConfig
from crossflow.core.errors import UserError
from crossflow.core.layers import Attention, rotary_2d


def test_scores_depend_only_on_relative_positions() -> None:
    torch.manual_seed(0)
    rotary = rotary_2d(5, 6, 16)
    query, key = torch.randn(2, 16).double()
    everywhere = torch.ones(1, 1, 30, 1, dtype=torch.float64)
    scores = rotary.turn(everywhere * query)[0, 0] @ rotary.turn(everywhere * key)[0, 0].T  # (30, 30)
    scores = scores.reshape(5, 6, 5, 6)
    assert torch.allclose(scores[0, 0, 2, 3], scores[2, 1, 4, 4], rtol=1e-5)
    assert torch.allclose(scores[3, 5, 1, 0], scores[4, 5, 2, 0], rtol=1e-5)
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0], rtol=1e-2)  # rows and columns differ
    assert not torch.allclose(scores[2, 2, 2, 3], scores[2, 2, 2, 1], rtol=1e-2)  # and so do directions


def test_rotation_keeps_norms() -> None:
    x = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotary_2d(3, 4, 8).turn(x).norm(dim=-1), x.norm(dim=-1))


def test_pairs_attend_only_within_the_reach() -> None:
    near = rotary_2d(2, 9, 8, reach=(4, 3)).near
    assert near is not None
    columns = torch.arange(18) % 9
    assert torch.equal(near, (columns[:, None] - columns).abs() < 3)
    assert rotary_2d(4, 3, 8, reach=(4, 3)).near is None  # nothing on a grid of training is out of reach
    assert rotary_2d(4, 90, 8).near is None


def test_tokens_out_of_reach_have_no_influence() -> None:
    torch.manual_seed(0)
    attention, rotary = Attention(16, 2), rotary_2d(1, 12, 8, reach=(1, 4))
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 0] += 1
    difference = (attention(x, rotary=rotary) - attention(changed, rotary=rotary)).abs().amax(dim=(0, 2))
    assert (difference[:4] > 1e-4).all()
    assert (difference[4:] == 0).all()


def wide_velocity(positions: str, column: int) -> torch.Tensor:
    """The velocity of an untrained network (no zero initialisation) for a small object at `column` of a wide canvas."""
    torch.manual_seed(0)
    model = DiT((2, 8, 8), Size(1, width=16, heads=2), BackboneConfig(patch=2, positions=positions, conv=3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z = torch.zeros(1, 2, 8, 48)
    z[..., 2:6, column : column + 4] = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(z, torch.tensor([0.3]), torch.tensor([False]))[0]


def test_velocity_of_an_object_does_not_depend_on_its_place() -> None:
    """Four columns of patches in training, 24 here. What an object changes reaches 3 columns by attention and 1 by the
    convolution, so that both places are apart from the borders by more than that.
    """
    left, right = wide_velocity("rotary", 14), wide_velocity("rotary", 26)
    torch.testing.assert_close(left[..., 10:24], right[..., 22:36], rtol=1e-4, atol=1e-5)
    assert left[..., 14:18].std() > 0.1
    left, right = wide_velocity("sincos", 14), wide_velocity("sincos", 26)
    assert (left[..., 10:24] - right[..., 22:36]).abs().max() > 0.1  # absolute positions tell the places apart


@pytest.mark.parametrize(("shape", "heads"), [((7, 4), 2), ((2, 8, 8), 8)])
def test_rotary_positions_need_a_grid_and_wide_enough_heads(shape: tuple[int, ...], heads: int) -> None:
    with pytest.raises(UserError, match="rotary"):
        DiT(shape, Size(1, 16, heads), BackboneConfig(patch=2, positions="rotary"))
