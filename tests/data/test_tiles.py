"""Pictures of any size: tiles cover everything, blending loses nothing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossflow.data.tiles import Tiles, blend_window, cut, fit_shorter_side, join, tile_starts


@pytest.mark.parametrize("length", [16, 17, 28, 29, 100, 333])
@pytest.mark.parametrize("overlap", [0, 4, 7])
def test_tiles_cover_everything_and_share_at_least_the_overlap(length: int, overlap: int) -> None:
    starts = tile_starts(length, 16, overlap)
    assert starts[0] == 0
    assert starts[-1] + 16 == length
    for first, second in pairwise(starts):
        assert overlap <= first + 16 - second < 16


@pytest.mark.parametrize(("length", "overlap"), [(48, 4), (52, 5), (100, 15), (16, 8)])
def test_tiles_start_on_the_grid_of_the_low_resolution(length: int, overlap: int) -> None:
    starts = tile_starts(length, 16, overlap, align=4)
    assert all(start % 4 == 0 for start in starts)
    assert starts[-1] + 16 == length
    assert all(first + 16 - second >= min(overlap, 12) for first, second in pairwise(starts))


def test_cutting_and_joining_gives_the_picture_back() -> None:
    image = np.random.default_rng(0).random((50, 37, 3)).astype(np.float32)
    pieces, starts = cut(image, 16, 5)
    np.testing.assert_allclose(join(pieces, starts, image.shape, 16, 5), image, rtol=1e-5)


def test_tiles_blend_gradually_across_a_seam() -> None:
    pieces, starts = cut(np.zeros((16, 28, 3), np.float32), 16, 4)
    joined = join([piece + number for number, piece in enumerate(pieces)], starts, (16, 28, 3), 16, 4)
    row = joined[8, :, 0]
    assert row[0] == 0
    assert row[-1] == 1
    assert np.all(np.diff(row) >= 0)
    assert np.diff(row).max() < 0.5


def test_the_blend_window_is_positive_everywhere() -> None:
    assert blend_window(16, 4).min() > 0
    assert blend_window(16, 0).min() == blend_window(16, 0).max() == 1


@given(height=st.integers(1, 70), width=st.integers(1, 70), overlap=st.integers(0, 12))
def test_a_picture_of_any_size_goes_through_tiles_unchanged(height: int, width: int, overlap: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tiles = Tiles.of(image, 16, overlap, 4)
    np.testing.assert_array_equal(tiles.join(tiles.pieces), image)
    shapes = {piece.shape for piece in tiles.pieces}
    assert len(shapes) == 1
    assert all(height % 4 == 0 and width % 4 == 0 and max(height, width) <= 16 for height, width, _ in shapes)


@pytest.mark.parametrize(
    ("shape", "fitted"), [((100, 50), (64, 32)), ((50, 100), (32, 64)), ((33, 32), (32, 32)), ((1, 900), (32, 128))]
)
def test_the_shorter_side_is_fitted_and_sides_are_multiples(shape: tuple[int, int], fitted: tuple[int, int]) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    assert fit_shorter_side(image, 32, 4).shape == (*fitted, 3)
