"""The picture sets of super-resolution, each on a miniature of the published layout."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.data.item import BadItem
from crossflow.data.readers import open_reader, picture_sets
from crossflow.data.resize import center_crop_resize

REAL = os.environ.get("CROSSFLOW_TEST_DATA")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(path: Path, height: int, width: int) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(image).save(path, format="PNG")  # whatever the ending: JPEG would change the pixels
    return image


@pytest.fixture
def imagenet(tmp_path) -> Path:
    folder = tmp_path / "data"
    for name, height, width in (("a", 300, 256), ("b", 255, 400), ("c", 256, 700)):
        noise(folder / f"train/n01440764/n01440764_{name}.JPEG", height, width)
    noise(folder / "val/ILSVRC2012_val_00000001.JPEG", 280, 290)
    return folder


def test_imagenet_leaves_small_pictures_out_and_cuts_the_centre(imagenet):
    reader = open_reader(str(imagenet), "train")
    assert reader.spec.startswith("imagenet:")
    assert reader.ids == [f"train/n01440764/n01440764_{name}.JPEG" for name in "ac"]
    assert not reader.problems
    image = np.array(Image.open(imagenet / "train/n01440764/n01440764_c.JPEG"))
    np.testing.assert_array_equal(reader[1].image, image[:, 222:478])
    image = np.array(Image.open(imagenet / "train/n01440764/n01440764_a.JPEG"))
    np.testing.assert_array_equal(reader[0].image, image[22:278])
    assert open_reader(f"imagenet:{imagenet}", "val")[0].image.shape == (256, 256, 3)
    with pytest.raises(UserError, match="train, val but nothing for 'test'"):
        open_reader(f"imagenet:{imagenet}", "test")


def test_imagenet_can_have_another_size(imagenet):
    reader = open_reader(f"imagenet:{imagenet}?min_side=64&size=64", "train")
    assert len(reader) == 3
    image = np.array(Image.open(imagenet / "train/n01440764/n01440764_b.JPEG"))
    np.testing.assert_array_equal(reader[1].image, center_crop_resize(image, 64))
    assert open_reader(f"imagenet:{imagenet}?size=none", "val")[0].image.shape == (280, 280, 3)
    with pytest.raises(UserError, match="shorter side of 500 pixels"):
        open_reader(f"imagenet:{imagenet}?min_side=500", "train")
    assert reader.fingerprint() != open_reader(f"imagenet:{imagenet}?min_side=64", "train").fingerprint()


def test_sizes_are_read_again_only_when_a_picture_changes(imagenet, cache, monkeypatch):
    looked = []
    plain = picture_sets._shorter_side
    monkeypatch.setattr(
        picture_sets, "_shorter_side", lambda *arguments: looked.append(arguments[1]) or plain(*arguments)
    )
    open_reader(f"imagenet:{imagenet}", "train")
    open_reader(f"imagenet:{imagenet}", "train")
    assert len(looked) == 3
    noise(imagenet / "train/n01440764/n01440764_b.JPEG", 256, 256)
    assert len(open_reader(f"imagenet:{imagenet}", "train")) == 3
    assert len(looked) == 6
    for file in cache.rglob("*.npy"):
        file.write_bytes(b"damaged")
    assert len(open_reader(f"imagenet:{imagenet}", "train")) == 3


def test_a_damaged_picture_is_a_bad_item_not_a_small_one(imagenet):
    (imagenet / "train/n01440764/n01440764_a.JPEG").write_bytes(b"no picture")
    reader = open_reader(f"imagenet:{imagenet}", "train")
    assert list(reader.problems) == ["train/n01440764/n01440764_a.JPEG"]
    with pytest.raises(BadItem, match="size cannot be read"):
        reader[0]


def test_div2k(tmp_path, caplog):
    for name in ("DIV2K_train_HR/0001", "DIV2K_train_HR/0002", "DIV2K_valid_HR/0801"):
        noise(tmp_path / f"{name}.png", 8, 10)
    assert open_reader(str(tmp_path), "train").ids == ["0001", "0002"]
    assert open_reader(f"div2k:{tmp_path}", "val").ids == ["0801"]
    assert "2 pictures in DIV2K_train_HR; the published one has 800" in caplog.text
    with pytest.raises(UserError, match="never published"):
        open_reader(f"div2k:{tmp_path}", "test")


def test_a_scored_set_is_complete_or_refused(tmp_path):
    for number in range(5):
        noise(tmp_path / f"Set5/{number}.png", 8, 10)
    for split in ("val", "test", "all"):
        assert open_reader(f"set5:{tmp_path}", split).ids == list("01234")
    assert open_reader(f"set5:{tmp_path}/Set5", "test")[2].image.shape == (8, 10, 3)
    with pytest.raises(UserError, match="never trained on"):
        open_reader(f"set5:{tmp_path}", "train")
    with pytest.raises(UserError, match=r"Set14 has 14 pictures, got 5 in .*Set5.*folder:"):
        open_reader(f"set14:{tmp_path}/Set5", "test")
    (tmp_path / "Set5/4.png").unlink()
    with pytest.raises(UserError, match="Set5 has 5 pictures, got 4"):
        open_reader(f"set5:{tmp_path}", "test")


def test_only_the_high_resolution_pictures_of_pairs_are_read(tmp_path):
    for number in range(100):
        for kind in ("HR", "LR"):
            noise(tmp_path / f"Urban100/image_SRF_4/img_{number:03d}_SRF_4_{kind}.png", 4, 4)
    reader = open_reader(f"urban100:{tmp_path}", "test")
    assert len(reader) == 100
    assert all(id.endswith("HR") for id in reader.ids)


@pytest.mark.skipif(not REAL, reason="CROSSFLOW_TEST_DATA is not set")
def test_published_copies_of_set5_and_b100_are_complete():
    for name, count in (("set5", 5), ("b100", 100)):
        reader = open_reader(f"{name}:{REAL}/data/sr", "test")
        assert len(reader) == count
        assert min(reader[0].image.shape[:2]) > 200
