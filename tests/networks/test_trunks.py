"""Trunks of picture encoders: shapes, any size, the identity."""

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.networks.alignment import PictureHead
from crossflow.networks.trunks import IdentityTrunk, PatchTrunk, PatchTrunkSettings, Reconstructor


def test_a_patch_trunk_reads_any_size_that_is_a_multiple_of_its_patch() -> None:
    trunk = PatchTrunk(3, 1, PatchTrunkSettings(width=32, depth=1, patch=4, log_var=-2.0))
    for height, width in ((8, 8), (12, 20)):
        both = trunk(torch.randn(2, 3, height, width))
        assert both.shape == (2, 2, 1, height, width)
        assert abs(both[:, 1].mean() + 2) < 0.3


@torch.no_grad()
def test_a_patch_trunk_with_rotary_positions_reads_every_part_of_a_wide_picture_alike() -> None:
    torch.manual_seed(0)
    trunk = PatchTrunk(3, 1, PatchTrunkSettings(width=32, depth=1, patch=4, positions="rotary", trained_grid=(4, 4)))
    picture = torch.zeros(2, 3, 16, 96)
    picture[0, :, 4:12, 24:32] = picture[1, :, 4:12, 56:64] = torch.randn(3, 8, 8)
    left, right = trunk(picture)
    torch.testing.assert_close(left[..., 16:40], right[..., 48:72])


@pytest.mark.parametrize("conv_stem", [False, True])
def test_a_patch_trunk_sees_position_and_content_of_a_patch(conv_stem: bool) -> None:
    torch.manual_seed(0)
    trunk = PatchTrunk(3, 1, PatchTrunkSettings(width=32, depth=1, patch=4, conv_stem=conv_stem))
    flat = torch.zeros(1, 3, 16, 16)
    dotted = flat.clone()
    dotted[:, :, 5, 6] = 1.0
    plain, changed = trunk(flat), trunk(dotted)
    assert plain.shape == changed.shape == (1, 2, 1, 16, 16)
    assert not torch.allclose(plain[..., :4, :4], plain[..., 8:12, 8:12])
    assert not torch.allclose(plain, changed)


def test_a_convolutional_stem_takes_powers_of_two() -> None:
    for patch in (1, 3, 12):
        with pytest.raises(UserError, match=f"got {patch}"):
            PatchTrunk(3, 1, PatchTrunkSettings(width=32, depth=1, patch=patch, conv_stem=True))


def test_the_mean_of_an_identity_trunk_is_its_input() -> None:
    x = torch.randn(2, 3, 5, 7)
    for variational in (False, True):
        mean, log_var = IdentityTrunk(3, variational)(x).unbind(1)
        assert torch.equal(mean, x)
        assert log_var.unique().tolist() == ([-6.0] if variational else [0.0])


def test_heads_have_the_requested_sizes() -> None:
    assert PictureHead(3, 48)(torch.randn(2, 3, 16, 16)).shape == (2, 48)
    assert Reconstructor(1, 3)(torch.randn(2, 1, 6, 8)).shape == (2, 3, 6, 8)
