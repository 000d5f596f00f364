"""Every kind of picture file is read as people see it, and files are written whole or not at all."""

import io
import os

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


@pytest.mark.parametrize(
    ("mode", "grey"), [("L", True), ("1", True), ("LA", True), ("I;16", True), ("RGB", False), ("P", False)]
)
def test_a_file_with_one_channel_is_grey_and_one_with_three_equal_ones_is_not(mode, grey):
    picture = Image.fromarray(noise(5, 6, channels=0))
    if mode == "I;16":
        picture = Image.fromarray(noise(5, 6, channels=0).astype(np.uint16) * 257)
    content = encode(picture if mode == "I;16" else picture.convert(mode))
    image = images.load_image(content)
    assert (image[..., 0] == image[..., 2]).all()
    assert images.is_grey(image, content) == grey
    assert not images.is_grey(np.dstack([image[..., :2], 255 - image[..., 0]]), content)


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


def test_paths_bytes_and_files_give_the_same_picture(tmp_path):
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


def test_a_truncated_file_is_a_picture_or_a_value_error():
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
    with pytest.raises(ValueError, match="16-bit grey PNG as depth map, got mode RGB"):
        images.load_depth_png(encode(Image.fromarray(noise(2, 2))))
