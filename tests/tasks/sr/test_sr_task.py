"""Super-resolution pairs: the source is the bicubic baseline, at the right place."""

import numpy as np
import pytest

from crossflow.tasks.sr.dataset import enlarge, random_pair, reduce, to_multiple


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / 20
    return np.stack([127 + 100 * np.sin(x + y), 127 + 100 * np.cos(y), 127 + 100 * np.sin(2 * x)], 2).astype(np.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_crop_is_the_picture_and_its_bicubic_version(scale: int) -> None:
    image = smooth(97, 120)
    whole = enlarge(reduce(to_multiple(image, scale), scale), scale)
    found = 0
    for seed in range(12):
        sharp, bicubic = random_pair(image, 12 * scale, scale, np.random.default_rng(seed))
        assert sharp.shape == bicubic.shape == (12 * scale, 12 * scale, 3)
        for turned in _turns(sharp, bicubic):
            place = _find(image, turned[0])
            if place is None:
                continue
            found += 1
            same = whole[place[0] : place[0] + 12 * scale, place[1] : place[1] + 12 * scale]
            if same.shape == turned[1].shape and place[0] > 0 and place[1] > 0:
                inside = slice(scale, -scale)
                assert np.abs(same[inside, inside].astype(int) - turned[1][inside, inside]).max() <= 3
            break
    assert found == 12


def _turns(sharp: np.ndarray, bicubic: np.ndarray):
    for flip in (1, -1):
        for turns in range(4):
            yield np.rot90(sharp[:, ::flip], turns), np.rot90(bicubic[:, ::flip], turns)


def _find(image: np.ndarray, piece: np.ndarray) -> tuple[int, int] | None:
    size = len(piece)
    for top in range(image.shape[0] - size + 1):
        for left in range(image.shape[1] - size + 1):
            if np.array_equal(image[top, left], piece[0, 0]) and np.array_equal(
                image[top : top + size, left : left + size], piece
            ):
                return top, left
    return None


@pytest.mark.parametrize("shape", [(1, 1), (5, 100), (31, 33)])
def test_pictures_smaller_than_the_crop_still_give_one(shape: tuple[int, int]) -> None:
    sharp, bicubic = random_pair(smooth(*shape), 32, 4, np.random.default_rng(0))
    assert sharp.shape == bicubic.shape == (32, 32, 3)
