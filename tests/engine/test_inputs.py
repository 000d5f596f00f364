"""Inputs in every form that people have become one form, and the ids of their noise follow from their content."""

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.engine import inputs
from crossflow.engine.inputs import item_ids, read_inputs, read_picture

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
GREY_AS_RGB = np.repeat(GREY[..., None], 3, axis=2)


def test_docstring_examples_run() -> None:
    assert doctest.testmod(inputs).failed == 0


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).movedim(-1, 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (RGB, RGB),
        (Image.fromarray(RGB), RGB),
        (RGB.astype(np.float32) / 255, RGB),
        (RGB.astype(np.float64) / 255, RGB),
        ((RGB / 255).astype(np.float16), RGB),
        (torch.from_numpy(RGB), RGB),
        (channels_first(RGB), RGB),
        (channels_first(RGB).float() / 255, RGB),
        (channels_first(RGB).float().div(255).requires_grad_(), RGB),
        (GREY, GREY_AS_RGB),
        (GREY[..., None], GREY_AS_RGB),
        (Image.fromarray(GREY), GREY_AS_RGB),
        (torch.from_numpy(GREY), GREY_AS_RGB),
        (torch.from_numpy(GREY)[None], GREY_AS_RGB),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY_AS_RGB),
        (Image.fromarray(GREY > 127), np.where(GREY_AS_RGB > 127, 255, 0)),
        (np.dstack([RGB, np.full_like(GREY, 255)]), RGB),
        (np.dstack([RGB, np.zeros_like(GREY)]), np.full_like(RGB, 255)),
        (Image.fromarray(np.dstack([RGB, np.zeros_like(GREY)])), np.full_like(RGB, 255)),
        (channels_first(np.dstack([RGB, np.full_like(GREY, 255)])), RGB),
        (RGB[::-1, ::-1], RGB[::-1, ::-1]),
    ],
)
def test_pictures_are_read_in_every_form(value: object, expected: np.ndarray) -> None:
    picture = read_picture(value)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, expected)


def test_a_file_reads_as_its_opened_image_does(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(RGB, -1)
    with Image.open(tmp_path / "a.png") as image:
        for value in (tmp_path / "a.png", str(tmp_path / "a.png"), image):
            np.testing.assert_array_equal(read_picture(value), expected)


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    pixels = np.zeros((1, 1, 4), np.uint8)
    pixels[..., 3] = 51
    assert read_picture(pixels).tolist() == [[[204, 204, 204]]]
    assert read_picture(pixels / np.float32(255)).tolist() == [[[204, 204, 204]]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (RGB.astype(np.int64), r"floating point in \[0, 1\], got int64"),
        (GREY > 3, "got bool"),
        (RGB.astype(np.float32), "got values from .* Divide values up to 255 by 255"),
        (channels_first(RGB).float() / 127.5 - 1, r"\(x \+ 1\) / 2"),
        (np.full((4, 4), np.nan), "16 of 16 pixel values are NaN"),
        (np.full((4, 4, 3), np.inf, np.float32), "NaN or infinite"),
        (np.zeros((0, 4, 3), np.uint8), r"at least one pixel, got shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), r"got \(4, 4, 2\)"),
        (np.moveaxis(RGB, -1, 0), "Put the channels last"),
        (RGB[None], "Pass a batch as a list"),
        (np.uint8(3), "Expected a picture"),
        (np.zeros(3, np.uint8), r"got \(3,\)"),
        (None, "got None"),
        (7, "got int. This model takes pictures"),
        (Path("no such.png"), r"no such.png: no such file\. Expected a picture"),
        (Image.fromarray(np.zeros((2, 2), np.float32)), "no defined brightness"),
    ],
)
def test_unsuitable_values_are_refused_with_a_reason(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_picture(value)


def test_inputs_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(UserError, match=r"Expected a prompt \(a str\), got numpy.ndarray"):
        read_inputs(RGB, "text")
    with pytest.raises(UserError, match="empty list"):
        read_inputs([], "text")
    assert read_inputs(("a", "b"), "text") == ["a", "b"]
    assert read_inputs("half \ud800", "text") == ["half ?"]


def test_the_id_of_a_picture_is_its_content(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    forms = [RGB, tmp_path / "a.png", Image.fromarray(RGB), channels_first(RGB).float() / 255, RGB[:, :]]
    ids = {item_ids(read_inputs(form, "image"))[0] for form in forms}
    assert len(ids) == 1
    changed = RGB.copy()
    changed[0, 0, 0] ^= 1
    others = [changed, RGB.reshape(7, 5, 3), np.ascontiguousarray(RGB.transpose(1, 0, 2))]
    assert len(ids | {item_ids([other])[0] for other in others}) == 4


def test_repeated_inputs_continue_the_count() -> None:
    assert item_ids(["a", "b", "a"], num=2) == ["a/0", "a/1", "b/0", "b/1", "a/2", "a/3"]
    assert item_ids(["a", "a"]) == item_ids(["a"], num=2)
