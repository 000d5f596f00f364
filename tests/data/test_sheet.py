"""Sheets show every picture whole under any caption; colours of depth run from near to far."""

import numpy as np
import pytest

from crossflow.data.sheet import colour_depth, sheet


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_depth_colours_run_from_blue_to_red_and_unmeasured_is_black():
    picture = colour_depth(np.array([[0, np.nan, 1.0, 2.0, 3.0]]), near=0.8, far=3.2).astype(int)
    assert picture[0, :2].max() == 0
    assert picture[0, 2, 2] > picture[0, 2, 0]
    assert picture[0, 4, 0] > picture[0, 4, 2]
    assert colour_depth(np.zeros((2, 3))).max() == 0
    assert colour_depth(np.ones((2, 3))).shape == (2, 3, 3)


def test_sheet_holds_every_picture_whole():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    shapes = [(50, 50), (200, 20), (3, 700), (1, 1)]
    pictures = [np.full((*shape, 3), colour, np.uint8) for shape, colour in zip(shapes, colours, strict=True)]
    result = sheet(pictures, ["a", "b", "c", "d"], columns=2, cell=100)
    for colour, (height, width) in zip(colours, [(100, 100), (100, 10), (1, 100), (100, 100)], strict=True):
        here = np.argwhere((result == colour).all(-1))
        assert np.abs(here.max(0) - here.min(0) + 1 - (height, width)).max() <= 1


@pytest.mark.parametrize("text", ["", "שלום مرحبا", "😀👩‍👩‍👧", "\ud800\0\n\t", "x" * 10_000, "word " * 2000])
def test_sheet_takes_any_text(text):
    result = sheet([noise(8, 8)], [text], cell=96, title=text)
    assert result.shape[1] == 96 + 16
    assert result.shape[0] <= 96 + 16 + 7 * 18 + 8


def test_sheet_without_captions_and_with_grey_pictures():
    assert sheet([noise(8, 8, channels=0)] * 5).shape[2] == 3
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        sheet([noise(8, 8)] * 2, ["one"])
    with pytest.raises(ValueError, match="at least one"):
        sheet([])
