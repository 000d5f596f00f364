"""Every kind of file is read as people see it, resizing equals MATLAB's and Pillow's, writing is whole or nothing."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossflow.data import images


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = noise(4, 7)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],  # stored turned left, to be shown turned right
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(turned)), "PNG", exif=exif)
    np.testing.assert_array_equal(images.load_image(data), upright)


def test_damaged_exif_means_upright():
    data = encode(Image.new("RGB", (4, 3), "red"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert images.load_image(data).shape == (3, 4, 3)


def test_grey_and_bilevel_are_repeated():
    grey = noise(5, 6, channels=0)
    np.testing.assert_array_equal(images.load_image(encode(Image.fromarray(grey))), np.stack([grey] * 3, axis=-1))
    bits = encode(Image.fromarray(grey > 127))
    np.testing.assert_array_equal(images.load_image(bits)[..., 0], np.where(grey > 127, 255, 0))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_white(mode):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 51, 255  # black: fully clear, one fifth, opaque
    image = Image.fromarray(rgba).convert(mode) if mode != "PA" else Image.fromarray(rgba)
    format = "PNG"
    if mode == "PA":
        image = image.quantize(4)
    np.testing.assert_array_equal(images.load_image(encode(image, format))[0, :, 0], [255, 204, 0])


def test_transparent_colour_of_rgb_and_palette_is_white():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert (images.load_image(encode(red, transparency=(255, 0, 0))) == 255).all()
    assert (images.load_image(encode(red.quantize(2), "GIF", transparency=0)) == 255).all()


def test_palette_has_its_colours():
    colours = Image.fromarray(noise(4, 4) // 128 * 255)
    loaded = images.load_image(encode(colours.quantize(8)))
    np.testing.assert_array_equal(loaded, np.array(colours))


def test_cmyk_is_not_inverted():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for format in ("JPEG", "TIFF"):
        pixel = images.load_image(encode(cmyk, format))[4, 4].astype(int)
        assert pixel[0] > 240
        assert pixel[1:].max() < 15


def test_sixteen_bit_grey_is_scaled_not_cut():
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    for format in ("PNG", "TIFF"):
        loaded = images.load_image(encode(Image.fromarray(values), format))
        np.testing.assert_array_equal(loaded[0, :, 2], [0, 0, 1, 128, 255])


def test_one_pixel():
    assert images.load_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_first_frame_of_an_animation():
    data = encode(
        Image.new("RGB", (2, 2), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (2, 2), "blue")]
    )
    assert images.load_image(data)[0, 0].tolist() == [255, 0, 0]


def test_path_bytes_and_file_are_the_same(tmp_path):
    data = encode(Image.fromarray(noise(3, 3)))
    path = tmp_path / "ein Bild ü.png"
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data)):
        np.testing.assert_array_equal(images.load_image(source), noise(3, 3))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a known format"),
        (encode(Image.fromarray(noise(64, 64)))[:2000], "cannot be decoded"),
        (encode(Image.fromarray(noise(64, 64)), "JPEG")[:1500], "truncated"),
        (encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating-point pixels"),
        (encode(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "70000"),
    ],
)
def test_unreadable_files_say_why(tmp_path, content, reason):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        images.load_image(path)


def test_missing_file_and_folder_say_why(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        images.load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="cannot be opened"):
        images.load_image(tmp_path)


def test_every_cut_of_a_file_is_a_value_error_or_a_picture():
    for format in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        data = encode(Image.fromarray(noise(9, 9)), format)
        for end in range(0, len(data), max(1, len(data) // 40)):
            try:
                assert images.load_image(data[:end]).shape == (9, 9, 3)
            except ValueError as error:
                assert str(error)  # noqa: PT017


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [10_001, 12_000, 30_000])
def test_decompression_bombs_are_refused_without_decoding(side):
    header = bytearray(encode(Image.new("1", (8, 8))))
    header[16:24] = side.to_bytes(4, "big") * 2  # the size in IHDR
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="limit"):
        images.load_image(bytes(header))


def test_pixel_limit_can_be_lowered():
    with pytest.raises(ValueError, match="8 x 9 pixels, the limit is 71"):
        images.load_image(encode(Image.new("RGB", (8, 9))), max_pixels=71)


# --------------------------------------------------------------------------------------------- arrays and tensors


def test_tensor_round_trip_is_exact_for_every_value():
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    tensor = images.to_tensor(ramp)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    np.testing.assert_array_equal(images.to_uint8(tensor), ramp)
    np.testing.assert_array_equal(images.to_uint8(images.to_tensor(ramp[None])), ramp[None])


def test_to_uint8_rounds_and_clips():
    values = (torch.tensor([-9.0, 0.4, 0.6, 254.4, 254.6, 999.0]) / 127.5 - 1).expand(3, 1, 6)
    assert images.to_uint8(values)[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]
    assert images.to_uint8(torch.full((3, 1, 1), torch.inf)).max() == 255


def test_to_uint8_refuses_nan():
    with pytest.raises(ValueError, match="12 of 12 pixel values are NaN"):
        images.to_uint8(torch.full((3, 2, 2), torch.nan))


def test_to_tensor_refuses_floats():
    with pytest.raises(ValueError, match="float64"):
        images.to_tensor(np.zeros((2, 2, 3)))


# ------------------------------------------------------------------------------------------------------- resizing


def test_centre_crop_keeps_the_middle():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    assert (images.center_crop_resize(image, 10) == 200).all()
    assert (images.center_crop_resize(image.transpose(1, 0, 2), 5) == 200).all()


@pytest.mark.parametrize("size", [1, 7, 64, (12, 5), (1, 40)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (33, 20)])
def test_centre_crop_gives_the_wanted_size(shape, size):
    expected = (size, size) if isinstance(size, int) else size
    assert images.center_crop_resize(noise(*shape), size).shape == (*expected, 3)
    assert images.center_crop_resize(np.ones(shape, np.float32), size, resample="nearest").shape == expected


def test_nearest_crop_is_registered_with_the_picture_and_mixes_nothing():
    depth = np.repeat(np.repeat(np.arange(1, 13, dtype=np.float32).reshape(3, 4), 9, axis=0), 9, axis=1)
    small = images.center_crop_resize(depth, 3, resample="nearest")
    np.testing.assert_array_equal(small, [[1, 2, 3], [5, 6, 7], [9, 10, 11]])
    picture = np.repeat(depth[..., None].astype(np.uint8) * 10, 3, axis=-1)
    np.testing.assert_allclose(images.center_crop_resize(picture, 27)[..., 0] / 10, depth[:, 4:31], atol=0.1)


def direct_imresize(row, scale):
    """MATLAB's rule for one row, written with loops."""
    length = len(row)
    out = []
    for i in range(1, int(np.ceil(length * scale)) + 1):
        u = i / scale + 0.5 * (1 - 1 / scale)
        narrow = min(scale, 1.0)
        total = weight_sum = 0.0
        for j in range(int(np.floor(u - 2 / narrow)) - 1, int(np.ceil(u + 2 / narrow)) + 2):
            x = abs((u - j) * narrow)
            if x <= 1:
                weight = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x <= 2:
                weight = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            else:
                weight = 0.0
            mirrored = (j - 1) % (2 * length)
            total += weight * row[mirrored if mirrored < length else 2 * length - 1 - mirrored]
            weight_sum += weight
        out.append(total / weight_sum)
    return np.array(out)


@pytest.mark.parametrize("scale", [1 / 4, 1 / 3, 1 / 2, 0.7, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 24])
def test_imresize_equals_the_rule_for_one_row(length, scale):
    row = np.random.default_rng(length).normal(size=length)
    expected = direct_imresize(row, scale)
    square = images.imresize_matlab(np.outer(np.ones(length), row), scale)
    np.testing.assert_allclose(square[0], expected, atol=1e-12)
    np.testing.assert_allclose(
        images.imresize_matlab(np.outer(row, np.ones(length)), scale)[:, 0], expected, atol=1e-12
    )


def test_imresize_of_uint8_rounds_after_each_pass():
    image = noise(20, 28)
    height_first = np.stack([[direct_imresize(c, 0.5) for c in channel.T] for channel in np.moveaxis(image, -1, 0)])
    rounded = np.clip(np.floor(height_first + 0.5), 0, 255)  # (3, W, H / 2)
    both = np.stack([[direct_imresize(c, 0.5) for c in channel.T] for channel in rounded])
    expected = np.clip(np.floor(both + 0.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    result = images.imresize_matlab(image, 0.5)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


# sha-256 of the pixels of the MATLAB-made low-resolution files of SelfExSR (Huang et al., CVPR 2015), x4.
SELFEXSR_SET5_X4 = {
    "baby.png": "08155c10a5fb09256ee15a04d1cbea46331400fb537b1bb5b0697b42b979cf27",
    "bird.png": "41763f1c1ab0238c565f4195bd1ece82ac42a6a3d7031fe60a92fc6e280a4c90",
    "butterfly.png": "44964b84fa42882e6cc0c32824a4d77809f6f4a5e9e8dd3aa27b740d97e972a6",
    "head.png": "701b5b1c01f0450fa2f9981abb5bbc0370d6ccfd83ece3c23f77f341f42e81be",
    "woman.png": "5309aa740cc2c8d5ccafd47603b9b799d05c8fba346f0f915801157425328c97",
}


@pytest.mark.parametrize("name", SELFEXSR_SET5_X4)
def test_imresize_equals_published_matlab_output(name):
    root = os.environ.get("CROSSFLOW_TEST_DATA")
    if not root:
        pytest.skip("CROSSFLOW_TEST_DATA is not set")
    high = images.load_image(Path(root) / "data" / "sr" / "Set5" / name)
    high = high[: high.shape[0] // 4 * 4, : high.shape[1] // 4 * 4]
    low = images.imresize_matlab(high, 1 / 4, border="repeat")
    assert hashlib.sha256(low.tobytes()).hexdigest() == SELFEXSR_SET5_X4[name]


def test_imresize_says_what_it_cannot_do():
    for image, scale, reason in (
        (noise(4, 4), 0, "scale"),
        (noise(4, 4), float("nan"), "scale"),
        (np.zeros((4, 4), np.int32), 0.5, "int32"),
        (np.zeros((0, 4)), 0.5, "at least one pixel"),
    ):
        with pytest.raises(ValueError, match=reason):
            images.imresize_matlab(image, scale)


def test_luma_known_values():
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    np.testing.assert_allclose(images.rgb_to_y(colours), [16, 235, 81.481, 144.553, 40.966], atol=1e-9)


# -------------------------------------------------------------------------------------------------------- writing


def test_png_keeps_pixels_and_metadata(tmp_path):
    prompt = 'a "red" cube, über 😀 שלום'
    path = images.save_png(
        noise(5, 4), tmp_path / "new folder" / "x.png", {"prompt": prompt, "seed": 7, "steps": [1, 2]}
    )
    np.testing.assert_array_equal(images.load_image(path), noise(5, 4))
    assert images.read_metadata(path) == {"prompt": prompt, "seed": "7", "steps": "[1, 2]"}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.png"]


def test_png_metadata_survives_any_text(tmp_path):
    text = images.read_metadata(
        images.save_png(noise(1, 1), tmp_path / "x.png", {"prompt": "a\0b\ud800" + "x" * 10_000})
    )
    assert text["prompt"] == "a b?" + "x" * 10_000


def test_latin_metadata_is_a_text_chunk(tmp_path):
    assert b"tEXtprompt\0a cube" in images.save_png(noise(1, 1), tmp_path / "x.png", {"prompt": "a cube"}).read_bytes()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = images.save_png(noise(2, 2), tmp_path / "x.png")
    before = path.read_bytes()

    def broken(source, target):
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk is full"):
        images.save_png(noise(3, 3), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("array", [np.zeros((2, 2, 3)), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2), np.uint8)])
def test_png_refuses_other_arrays(tmp_path, array):
    with pytest.raises(ValueError, match="expected uint8"):
        images.save_png(array, tmp_path / "x.png")


def test_depth_round_trip_is_within_half_a_unit(tmp_path):
    depth = np.random.default_rng(0).uniform(0.001, 65.5, (9, 7)).astype(np.float32)
    depth[0] = 0, -1, np.nan, np.inf, -np.inf, 0.5, 65.535
    path = images.save_depth_png(depth, tmp_path / "d.png")
    loaded = images.load_depth_png(path)
    assert loaded.dtype == np.float32
    assert loaded[0, :5].tolist() == [0, 0, 0, 0, 0]
    assert np.abs(loaded - depth)[1:].max() <= 0.0005 + 1e-5
    assert Image.open(path).mode == "I;16"
    kitti = images.save_depth_png(depth[1:] * 2, tmp_path / "k.png", units_per_metre=256)
    assert np.abs(images.load_depth_png(kitti, units_per_metre=256) - depth[1:] * 2).max() <= 0.5 / 256 + 1e-5


def test_depth_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"80\.0 m does not fit.*65\.5 m"):
        images.save_depth_png(np.full((2, 2), 80.0), tmp_path / "d.png")
    assert not list(tmp_path.iterdir())


def test_a_colour_picture_is_not_depth():
    with pytest.raises(ValueError, match="16-bit grey PNG, this picture has mode RGB"):
        images.load_depth_png(encode(Image.fromarray(noise(2, 2))))


# ------------------------------------------------------------------------------------------------------- pictures


def test_depth_colours_run_from_blue_to_red_and_unmeasured_is_black():
    picture = images.colour_depth(np.array([[0, np.nan, 1.0, 2.0, 3.0]]), near=0.8, far=3.2).astype(int)
    assert picture[0, :2].max() == 0
    assert picture[0, 2, 2] > picture[0, 2, 0]
    assert picture[0, 4, 0] > picture[0, 4, 2]
    assert images.colour_depth(np.zeros((2, 3))).max() == 0
    assert images.colour_depth(np.ones((2, 3))).shape == (2, 3, 3)


def test_sheet_holds_every_picture_whole():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    shapes = [(50, 50), (200, 20), (3, 700), (1, 1)]
    pictures = [np.full((*shape, 3), colour, np.uint8) for shape, colour in zip(shapes, colours, strict=True)]
    result = images.sheet(pictures, ["a", "b", "c", "d"], columns=2, cell=100)
    for colour, (height, width) in zip(colours, [(100, 100), (100, 10), (1, 100), (100, 100)], strict=True):
        here = np.argwhere((result == colour).all(-1))
        assert np.abs(here.max(0) - here.min(0) + 1 - (height, width)).max() <= 1


@pytest.mark.parametrize("text", ["", "שלום مرحبا", "😀👩‍👩‍👧", "\ud800\0\n\t", "x" * 10_000, "word " * 2000])
def test_sheet_takes_any_text(text):
    result = images.sheet([noise(8, 8)], [text], cell=96, title=text)
    assert result.shape[1] == 96 + 16
    assert result.shape[0] <= 96 + 16 + 7 * 18 + 8


def test_sheet_without_captions_and_with_grey_pictures():
    assert images.sheet([noise(8, 8, channels=0)] * 5).shape[2] == 3
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        images.sheet([noise(8, 8)] * 2, ["one"])
    with pytest.raises(ValueError, match="at least one"):
        images.sheet([])
