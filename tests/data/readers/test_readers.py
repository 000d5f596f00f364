"""Every format on a miniature of its real layout, on real data where present, and on what files in the wild hold."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions
from crossflow.data.item import BadItem, Item, Record
from crossflow.data.reader import FileReader, Listing, Reader
from crossflow.data.readers import READERS, open_reader, require
from crossflow.data.splits import hashed_split, rank

REAL = os.environ.get("CROSSFLOW_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="CROSSFLOW_TEST_DATA is not set")


def picture(path: Path, size: tuple[int, int] = (6, 4), colour: int = 0) -> Path:
    """A PNG or JPEG of (width, height), of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 90, 30)).save(path)
    return path


def depth_map(path: Path, millimetres: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(millimetres.astype(np.uint16)).save(path)
    return path


def write_lines(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def coco_file(path: Path, captions: dict[str, list[str]], first_id: int = 1) -> Path:
    images = [{"id": first_id + number, "file_name": name} for number, name in enumerate(captions)]
    annotations = [
        {"id": len(captions) * number + place, "image_id": image["id"], "caption": text}
        for number, image in enumerate(images)
        for place, text in enumerate(captions[image["file_name"]])
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return path


def reasons(reader: Reader) -> dict[str, str]:
    return {item.id: item.reason for item in reader.load(range(len(reader))) if isinstance(item, BadItem)}


def by_id(reader: Reader) -> dict[str, Item]:
    return {item.id: item for item in reader.load(range(len(reader))) if isinstance(item, Item)}


# --------------------------------------------------------------------------------------------------------- finding data


def test_unknown_format_suggests_similar_and_lists_all_formats():
    with pytest.raises(UserError, match="Did you mean 'coco'") as error:
        open_reader("cocoo:/data", "train")
    assert all(name in str(error.value) for name in READERS.names())


@pytest.mark.parametrize("spec", ["scene", "", "/no/such/place", "x" * 5000, "~nobody-of-that-name/x", "a\0b"])
def test_an_unrecognised_spec_is_refused_with_the_known_formats(spec):
    with pytest.raises(UserError, match=r"Known: .*cache, coco, .*folder"):
        open_reader(spec, "train")


@pytest.mark.parametrize("prefix", ["coco", "jsonl", "folder", "pairs"])
def test_missing_and_nonexistent_locations_name_the_expected_layout(prefix, tmp_path):
    for spec in (prefix, f"{prefix}:", f"{prefix}:{tmp_path}/absent"):
        with pytest.raises(UserError) as error:
            open_reader(spec, "train")
        assert READERS.get(prefix).layout in str(error.value)


@pytest.mark.parametrize("prefix", ["coco", "jsonl", "folder", "pairs"])
def test_empty_folder_is_a_user_error(prefix, tmp_path):
    with pytest.raises(UserError, match=f"{prefix}:"):
        open_reader(f"{prefix}:{tmp_path}", "train")


def test_bad_split_limit_and_size_are_user_errors():
    for arguments, word in (({"split": "tset"}, "test"), ({"limit": 0}, "limit"), ({"image_size": 0}, "image_size")):
        with pytest.raises(UserError, match=word):
            open_reader("skimage", **{"split": "train"} | arguments)


def test_bare_paths_are_recognised_and_the_format_is_logged(tmp_path, caplog):
    picture(tmp_path / "coco/images/a.png")
    coco_file(tmp_path / "coco/captions_train.json", {"a.png": ["a"]})
    picture(tmp_path / "pairs/rgb/a.png")
    depth_map(tmp_path / "pairs/depth/a.png", np.ones((4, 6)))
    write_lines(tmp_path / "list.jsonl", {"img_path": "coco/images/a.png", "prompt": "a", "split": "train"})
    for name, prefix in (("coco", "coco"), ("pairs", "pairs"), ("list.jsonl", "jsonl"), ("coco/images", "folder")):
        caplog.clear()
        reader = open_reader(str(tmp_path / name), "train")
        assert reader.spec.startswith(f"{prefix}:")
        assert len(by_id(reader)) == 1
        assert f"as '{prefix}:" in caplog.text


def test_bare_folder_of_several_sets_is_refused_with_their_specs(tmp_path):
    picture(tmp_path / "a/images/x.png")
    coco_file(tmp_path / "a/captions_train.json", {"x.png": ["x"]})
    with pytest.raises(UserError, match=f"coco:{tmp_path}/a"):
        open_reader(str(tmp_path), "train")


def test_an_unrecognised_folder_lists_its_content_and_the_formats(tmp_path):
    (tmp_path / "notes.md").write_text("no data")
    with pytest.raises(UserError, match=r"notes\.md.*folder:"):
        open_reader(str(tmp_path), "train")


def test_a_split_in_the_spec_overrides_the_argument(tmp_path):
    for name in ("train/a.png", "val/b.png", "test/c.png"):
        picture(tmp_path / name)
    assert open_reader(f"folder:{tmp_path}@test", "train").ids == ["test/c.png"]
    assert open_reader(f"folder:{tmp_path}@all", "val").ids == ["test/c.png", "train/a.png", "val/b.png"]


def test_a_path_that_ends_like_a_split_is_a_path(tmp_path):
    picture(tmp_path / "x@val/a.png")
    assert open_reader(f"folder:{tmp_path}/x@val@all", "train").ids == ["a.png"]
    with pytest.raises(UserError, match="hash"):  # read as a path: of one image nothing is left for val
        open_reader(f"{tmp_path}/x@val", "val")


def test_adding_a_format_is_one_class_and_one_line(tmp_path, monkeypatch):
    class TableReader(FileReader):
        prefix, layout, offers = "table", "a file of image names", frozenset(("image",))

        def listing(self, path, split):
            return Listing(path.parent, [Record(line, line) for line in path.read_text().split()])

    monkeypatch.setattr(READERS, "_entries", dict(READERS._entries))
    READERS.register("table")(TableReader)
    picture(tmp_path / "a.png")
    (tmp_path / "names.txt").write_text("a.png b.png")
    reader = open_reader(f"table:{tmp_path}/names.txt", "train")
    assert list(by_id(reader)) == ["a.png"]
    assert "no such file" in reasons(reader)["b.png"]


@pytest.mark.slow
def test_listing_data_imports_no_torch(tmp_path):
    picture(tmp_path / "a.png")
    code = f"""
import sys
from crossflow.data.readers import open_reader
open_reader("folder:{tmp_path}@all", "train")
assert not {{"torch", "skimage", "PIL"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --------------------------------------------------------------------------------------------------- fields and tasks


def test_data_without_a_required_field_give_a_one_paragraph_error(tmp_path):
    picture(tmp_path / "a.png")
    reader = open_reader(f"folder:{tmp_path}@all", "train")
    with pytest.raises(UserError) as error:
        require(reader, {"image", "depth"}, "depth")
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in ("'depth'", f"folder:{tmp_path}", "pairs", "scenes", "skimage"))


def test_items_without_a_required_field_are_bad_items(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a red square")
    reader = open_reader(f"folder:{tmp_path}@all", "train")
    assert not reasons(reader)
    assert reasons(require(reader, {"image", "captions"}, "t2i")) == {"b.png": "has no caption"}
    assert not reasons(reader)


def test_require_gives_the_reasons_when_all_items_are_bad(tmp_path):
    write_lines(tmp_path / "x.jsonl", "{broken", "[1]")
    with pytest.raises(UserError, match=r"line 1 of x\.jsonl"):
        require(open_reader(f"jsonl:{tmp_path}/x.jsonl@all", "train"), {"image"}, "sr")


# ------------------------------------------------------------------------------------------------- scenes and skimage


def test_scenes_have_every_field_and_disjoint_splits():
    readers = {split: open_reader("scenes", split, image_size=24, limit=6) for split in ("train", "val", "test")}
    visited = set()
    for reader in readers.values():
        assert reader.fields == {"image", "captions", "depth", "scene"}
        for item in reader:
            assert item.image.shape == (24, 24, 3)
            assert item.image.dtype == np.uint8
            assert item.depth.shape == (24, 24)
            assert item.depth.dtype == np.float32
            assert item.depth.max() > 0
            assert len(item.captions) == 5
            visited.add((item.id, item.scene.seed))
    assert len({id for id, _ in visited}) == len({seed for _, seed in visited}) == 18


def test_scenes_are_the_same_alone_together_and_under_any_limit():
    few, many = (open_reader("scenes", "val", image_size=16, limit=limit) for limit in (5, 700))
    assert len(many) == 700
    for alone, together in zip(few, many.load(range(5)), strict=True):
        assert alone.id == together.id
        assert alone.captions == together.captions
        np.testing.assert_array_equal(alone.image, together.image)
        np.testing.assert_array_equal(alone.depth, together.depth)


def test_scenes_refuse_invalid_indices_and_locations():
    reader = open_reader("scenes", "val", image_size=16, limit=3)
    with pytest.raises(IndexError):
        reader[3]
    for spec, split in (("scenes:there", "train"), ("scenes", "all")):
        with pytest.raises(UserError, match="scenes"):
            open_reader(spec, split)


@pytest.mark.slow
def test_skimage_photographs_exist_and_splits_share_no_pixel():
    pytest.importorskip("skimage")
    pieces = {split: by_id(open_reader("skimage", split)) for split in ("train", "val", "test", "all")}
    assert len(pieces["all"]) == 10
    assert len(pieces["all"]) == sum(len(pieces[split]) for split in ("train", "val", "test"))
    left, upper, lower = (pieces["all"][f"motorcycle_{part}"] for part in ("left", "upper_right", "lower_right"))
    whole = np.concatenate([left.image, np.concatenate([upper.image, lower.image])], axis=1)
    from skimage.data import stereo_motorcycle

    np.testing.assert_array_equal(whole, stereo_motorcycle()[0])


def test_skimage_depth_is_metric_and_registered():
    pytest.importorskip("skimage")
    from skimage.data import stereo_motorcycle

    photograph, _, disparity = stereo_motorcycle()
    item = by_id(open_reader("skimage", "train"))["motorcycle_left"]
    np.testing.assert_array_equal(item.image, photograph[:, :371])
    # The picture lies 2 to 5.1 m away: z = f b / (d + doffs), by the calibration that scikit-image states.
    row, column = 250, 300
    expected = 994.978 * 0.193001 / (disparity[row, column] + 31.086)
    assert item.depth[row, column] == pytest.approx(expected, rel=1e-6)
    assert 2.0 < item.depth[item.depth > 0].min() < item.depth.max() < 5.2
    np.testing.assert_array_equal(item.depth == 0, ~np.isfinite(disparity[:, :371]))


def test_skimage_gives_depth_to_every_split_and_refuses_captions():
    pytest.importorskip("skimage")
    for split in ("train", "val", "test"):
        reader = require(open_reader("skimage", split), {"image", "depth"}, "depth")
        assert len(reader) == 1
        assert reader[0].depth.shape == reader[0].image.shape[:2]
        assert np.mean(reader[0].depth > 0) > 0.5
    assert len(require(open_reader("skimage", "train"), {"image"}, "sr")) == 6
    for task in ("t2i", "caption"):
        with pytest.raises(UserError, match=rf"'{task}' needs captions and image.*no captions"):
            require(open_reader("skimage", "train"), {"image", "captions"}, task)


# ---------------------------------------------------------------------------------------------------------------- coco


def published_coco(folder: Path) -> Path:
    for number, split in enumerate(("train2017", "val2017")):
        names = [f"{1000 * number + place:012d}.jpg" for place in range(3)]
        for name in names:
            picture(folder / split / name)
        captions = {name: [f" a  picture {place}\n" for place in range(5)] for name in names}
        coco_file(folder / f"annotations/captions_{split}.json", captions, first_id=1000 * number + 1)
    return folder


def test_coco_as_published(tmp_path):
    reader = open_reader(f"coco:{published_coco(tmp_path)}", "train")
    assert reader.ids == ["1", "2", "3"]
    assert reader.fields == {"image", "captions"}
    assert reader[2].captions == tuple(f"a picture {place}" for place in range(5))
    assert reader[2].image.shape == (4, 6, 3)
    assert open_reader(f"coco:{tmp_path}", "val").ids == ["1001", "1002", "1003"]
    everything = open_reader(f"coco:{tmp_path}", "all")
    assert len(by_id(everything)) == 6


def test_coco_explains_missing_test_captions(tmp_path):
    published_coco(tmp_path)
    with pytest.raises(UserError, match=f"train, val but nothing for 'test'.*'coco:{tmp_path}@val'"):
        open_reader(f"coco:{tmp_path}", "test")


def test_coco_never_mixes_years(tmp_path, caplog):
    published_coco(tmp_path)
    coco_file(tmp_path / "annotations/captions_test2014.json", {"COCO_val2014_000000000001.jpg": ["a"]})
    with pytest.raises(UserError, match="nothing for 'test'"):
        open_reader(f"coco:{tmp_path}", "test")
    assert "captions of 2017, not those of 2014" in caplog.text
    (tmp_path / "annotations/captions_train2017.json").rename(tmp_path / "annotations/captions_train2014.json")
    with pytest.raises(UserError, match="train, test but nothing for 'val'"):  # val2017 shares images with train2014
        open_reader(f"coco:{tmp_path}", "val")


def test_coco_plain_layout_with_other_splits(tmp_path):
    for split, name in (("train", "a.png"), ("val", "b.png"), ("test", "c.png"), ("rest", "d.png")):
        picture(tmp_path / "images" / name)
        coco_file(tmp_path / f"captions_{split}.json", {name: [name]}, first_id=ord(name[0]))
    assert [item.captions for item in open_reader(f"coco:{tmp_path}", "test")] == [("c.png",)]
    assert len(by_id(open_reader(f"coco:{tmp_path}", "all"))) == 4


def test_coco_bad_entries_are_bad_items_with_reasons(tmp_path):
    names = ["good.png", "missing.png", "silent.png", "blank.png", "../outside.png", "/etc/passwd"]
    captions = {name: ["a cat"] for name in names} | {"silent.png": [], "blank.png": ["", "  \n"]}
    file = coco_file(tmp_path / "data/captions_train.json", captions)
    for name in ("good.png", "silent.png", "blank.png"):
        picture(tmp_path / "data/images" / name)
    picture(tmp_path / "data/outside.png")
    content = json.loads(file.read_text())
    content["images"] += [{"file_name": "no id.png"}, 7, {"id": 1, "file_name": "good.png"}]
    content["annotations"] += [{"image_id": 1, "caption": "another"}, "noise"]
    file.write_text(json.dumps(content))
    reader = open_reader(f"coco:{tmp_path}/data", "train")
    assert len(reader) == 9
    assert {id: item.captions for id, item in by_id(reader).items()} == {"1": ("a cat", "another")}
    expected = {
        "2": "no such file: 'missing.png'",
        "3": "has no caption",
        "4": "all its 2 captions are empty",
        "5": "path '../outside.png' leaves the data folder",
        "6": "path '/etc/passwd' leaves the data folder",
        "captions_train.json:images[6]": "no id and file_name",
        "captions_train.json:images[7]": "no id and file_name",
        "1#2": "the id '1' occurred before",
    }
    problems = reasons(reader)
    assert problems.keys() == expected.keys()
    assert all(part in problems[id] for id, part in expected.items())


def test_coco_files_of_another_kind_are_user_errors(tmp_path):
    file = tmp_path / "captions_train.json"
    for text in ("{", "[]", '{"images": 3, "annotations": []}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(UserError, match=r"captions_train\.json"):
            open_reader(f"coco:{tmp_path}", "train")


def test_coco_image_folder_may_be_a_link_but_images_must_stay_inside(tmp_path):
    data = published_coco(tmp_path / "data")
    shutil.move(data / "train2017", tmp_path / "elsewhere")
    (data / "train2017").symlink_to(tmp_path / "elsewhere")
    secret = picture(tmp_path / "secret.png")
    (tmp_path / "elsewhere/000000000001.jpg").unlink()
    (tmp_path / "elsewhere/000000000001.jpg").symlink_to(secret)
    reader = open_reader(f"coco:{data}", "train")
    assert list(by_id(reader)) == ["1", "3"]
    assert "is a link that leaves the data folder" in reasons(reader)["2"]


@pytest.mark.slow
@needs_real_data
def test_coco_reads_flickr8k():
    counts = {split: len(open_reader(f"coco:{REAL}/data/flickr8k", split)) for split in ("train", "val", "test", "all")}
    assert counts == {"train": 6000, "val": 1000, "test": 1000, "all": 8091}
    reader = open_reader(f"coco:{REAL}/data/flickr8k", "test", limit=20)
    assert not reasons(reader)
    assert all(item.image.shape == (160, 160, 3) and len(item.captions) == 5 for item in reader)


# --------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl_reads_journeydb(tmp_path):
    rows = [
        {"img_path": f"./{n % 2:03d}/{n}.png", "prompt": f"prompt {n}", "Task2": {"Caption": "x"}} for n in range(40)
    ]
    for row in rows:
        picture(tmp_path / "imgs" / row["img_path"])
    file = write_lines(tmp_path / "train_anno.jsonl", *rows)
    items = {}
    sizes = {}
    for split in ("train", "val", "test"):
        part = by_id(open_reader(f"jsonl:{file}", split))
        sizes[split] = len(part)
        items |= part
    assert len(items) == sum(sizes.values()) == 40
    assert sizes["train"] > 30
    assert items["001/7.png"].captions == ("prompt 7",)
    assert len(open_reader(f"jsonl:{file}@all", "train")) == 40


def test_jsonl_merges_lines_and_honours_splits(tmp_path, caplog):
    for name in "abcde":
        picture(tmp_path / f"{name}.png")
    file = write_lines(
        tmp_path / "x.jsonl",
        "\ufeff" + json.dumps({"image": "a.png", "caption": "one", "split": "train"}),
        "",
        {"image": "b.png", "captions": ["two", " ", "three"], "split": "dev"},
        {"image": "./a.png", "text": "four", "split": "train"},
        {"image": "c.png", "caption": "five", "split": "extra"},
        {"image": "d.png", "caption": "six", "split": "train"},
        {"image": "d.png", "caption": "six", "split": "test"},
        {"image": "e.png", "caption": "seven"},
    )
    train, val = (open_reader(f"jsonl:{file}", split) for split in ("train", "val"))
    assert {id: item.captions for id, item in by_id(train).items()} == {"a.png": ("one", "four")}
    assert {id: item.captions for id, item in by_id(val).items()} == {"b.png": ("two", "three")}
    assert "in the splits 'train' and 'test'" in reasons(train)["d.png"]
    assert reasons(val) == {"e.png": "has no split, but other lines have one"}
    assert "extra" in caplog.text


def test_jsonl_bad_lines_are_counted_with_their_numbers(tmp_path):
    for name in ("good.png", "empty.png", "number.png"):
        picture(tmp_path / "data" / name)
    picture(tmp_path / "outside.png")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "outside.png")
    file = write_lines(
        tmp_path / "data/x.jsonl",
        {"image": "good.png", "caption": "good"},
        '{"image": "good.png", "capt',
        "[1, 2]",
        {"caption": "no image"},
        {"image": 7, "caption": "number for a path"},
        {"image": "empty.png", "caption": ""},
        {"image": "number.png", "caption": 5},
        {"image": "missing.png", "caption": "x"},
        {"image": "../outside.png", "caption": "x"},
        {"image": str(tmp_path / "outside.png"), "caption": "x"},
        {"image": "link.png", "caption": "x"},
        {"image": "a\0b.png", "caption": "x"},
        {"image": "n" * 5000 + ".png", "caption": "x"},
        "[" * 100_000,
        {"image": ".", "caption": "x"},
    )
    with file.open("ab") as stream:
        stream.write(b'{"image": "good.png", "caption": "\xff"}\n')
    reader = open_reader(f"jsonl:{file}@all", "train")
    problems = reasons(reader)
    assert list(by_id(reader)) == ["good.png"]
    expected = {
        "x.jsonl:2": "line 2 of x.jsonl is not JSON",
        "x.jsonl:3": "line 3 of x.jsonl is not a JSON object",
        "x.jsonl:4": "line 4 of x.jsonl has no image path",
        "x.jsonl:5": "line 5 of x.jsonl has no image path",
        "empty.png": "all its captions are empty",
        "number.png": "line 7 of x.jsonl: caption is int, not text",
        "missing.png": "no such file",
        "../outside.png": "path '../outside.png' leaves the data folder",
        str(tmp_path / "outside.png"): "leaves the data folder",
        "link.png": "is a link that leaves the data folder",
        "a\0b.png": "is not a file name",
        "n" * 5000 + ".png": "",
        "x.jsonl:14": "line 14 of x.jsonl is not JSON",
        ".": "not a regular file",
        "x.jsonl:16": "line 16 of x.jsonl is not JSON",
    }
    assert problems.keys() == expected.keys()
    assert all(part in problems[id] for id, part in expected.items())


def test_jsonl_without_captions_is_images_only(tmp_path):
    picture(tmp_path / "a.png")
    file = write_lines(tmp_path / "x.jsonl", {"image": "a.png"})
    reader = open_reader(f"jsonl:{file}@all", "train")
    assert reader.fields == {"image"}
    assert not reasons(reader)


def test_a_pipe_among_the_images_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    file = write_lines(tmp_path / "x.jsonl", {"image": "pipe.png", "caption": "x"})
    assert "not a regular file" in reasons(open_reader(f"jsonl:{file}@all", "train"))["pipe.png"]


# -------------------------------------------------------------------------------------------------------------- folder


def test_folder_with_split_folders_and_captions_beside_the_images(tmp_path):
    for name in ("Training/x/a.JPG", "Training/b.webp", "validation/c.png", "stray.png", "Training/.hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "Training/x/a.txt").write_text("one\n\n  two \n", encoding="utf-8")
    (tmp_path / "Training/notes.md").write_text("not an image")
    train = open_reader(f"folder:{tmp_path}", "train")
    assert train.ids == ["Training/b.webp", "Training/x/a.JPG"]
    assert train[1].captions == ("one", "two")
    assert train.fields == {"image", "captions"}
    assert open_reader(f"folder:{tmp_path}", "val").fields == {"image"}
    with pytest.raises(UserError, match=r"train, val but nothing for 'test'"):
        open_reader(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize("place", [".", "train"])
def test_folder_with_metadata(tmp_path, place):
    for name in ("train/a.png", "train/b.png", "val/c.png"):
        picture(tmp_path / name)
    prefix = "train/" if place == "." else ""
    write_lines(
        tmp_path / place / "metadata.jsonl",
        {"file_name": f"{prefix}a.png", "text": "first"},
        {"file_name": f"{prefix}b.png", "text": " "},
        {"file_name": f"{prefix}missing.png", "text": "x"},
        {"file_name": "../../outside.png", "text": "x"},
        {"file_name": "/etc/passwd", "text": "x"},
        "{",
    )
    train = open_reader(f"folder:{tmp_path}", "train")
    assert {id: item.captions for id, item in by_id(train).items()} == {"train/a.png": ("first",)}
    problems = reasons(train)
    assert "no such file" in problems["train/missing.png"]
    assert "all captions are empty" in problems["train/b.png"]
    assert "leaves the data folder" in problems["metadata.jsonl:4"]
    assert "leaves the data folder" in problems["metadata.jsonl:5"]
    assert "not JSON" in problems["metadata.jsonl:6"]
    assert len(problems) == 5


@pytest.mark.parametrize(
    "content",
    [
        {"a.png": "one", "b/c.png": ["two", "three"]},
        [{"file_name": "a.png", "caption": "one"}, {"image": "b/c.png", "captions": ["two", "three"]}],
    ],
)
def test_folder_with_captions_json(tmp_path, content):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b/c.png")
    write_lines(tmp_path / "captions.json", content)
    items = by_id(open_reader(f"folder:{tmp_path}@all", "train"))
    assert {id: item.captions for id, item in items.items()} == {"a.png": ("one",), "b/c.png": ("two", "three")}


def test_folder_captions_that_cannot_be_read_make_bad_items(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").symlink_to("/etc/hostname")
    problems = reasons(open_reader(f"folder:{tmp_path}@all", "train"))
    assert "utf-8" in problems["a.png"]
    assert problems["b.png"] == "'b.txt' has no caption"
    assert "leaves the data folder" in problems["c.png"]


def test_adding_images_moves_no_other_between_hash_splits():
    names = [f"{number}.png" for number in range(4000)]
    ranks = np.array([rank(name) for name in names], np.uint64)
    splits, fewer = hashed_split(ranks, names.__getitem__), hashed_split(ranks[:3000], names.__getitem__)
    assert np.array_equal(splits[:3000], fewer)
    shares = np.bincount(splits) / 4000
    assert shares[0] == pytest.approx(0.90, abs=0.02)
    assert shares[1] == pytest.approx(0.05, abs=0.015)
    for count in range(3, 30):
        assert set(hashed_split(ranks[:count], names.__getitem__).tolist()) == {0, 1, 2}


def test_the_sizes_of_hash_splits_are_logged(tmp_path, caplog):
    for number in range(6):
        picture(tmp_path / f"{number}.png")
    ids = [id for split in ("train", "val", "test") for id in open_reader(f"folder:{tmp_path}", split).ids]
    assert sorted(ids) == [f"{number}.png" for number in range(6)]
    assert "divides it into 4 train, 1 val, 1 test" in caplog.text
    single = picture(tmp_path / "one/a.png").parent
    with pytest.raises(UserError, match=f"none for 'val'.*'folder:{single}@all'"):
        open_reader(f"folder:{single}", "val")


def test_linked_folders_are_skipped_with_a_warning(tmp_path, caplog):
    picture(tmp_path / "data/a.png")
    picture(tmp_path / "other/b.png")
    (tmp_path / "data/more").symlink_to(tmp_path / "other")
    assert open_reader(f"folder:{tmp_path}/data@all", "train").ids == ["a.png"]
    assert "linked folders more are not followed" in caplog.text


@needs_real_data
def test_folder_reads_the_super_resolution_sets():
    assert len(by_id(open_reader(f"folder:{REAL}/data/sr/Set5@all", "test"))) == 5
    b100 = open_reader(f"folder:{REAL}/data/sr/B100@all", "test")
    assert len(b100) == 100
    assert {b100[index].image.shape[:2] for index in range(10)} <= {(321, 481), (481, 321)}


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_with_frames(tmp_path):
    frames = []
    for number, split in enumerate(("train", "train", "val", "extra")):
        picture(tmp_path / f"rgb/{number}.jpg")
        depth_map(tmp_path / f"depth/{number}.png", np.full((4, 6), 1000 * number + 250))
        frames.append({"id": f"f{number}", "rgb": f"rgb/{number}.jpg", "depth": f"depth/{number}.png", "split": split})
    write_lines(tmp_path / "frames.json", {"depth_unit": "millimetre", "invalid": 0, "frames": [*frames, {"id": "?"}]})
    train = open_reader(f"pairs:{tmp_path}", "train")
    items = by_id(train)
    assert list(items) == ["f0", "f1"]
    np.testing.assert_array_equal(items["f1"].depth, np.full((4, 6), 1.25, np.float32))
    assert train.fields == {"image", "depth"}
    assert reasons(train) == {"frames.json:frames[4]": "frames.json:frames[4] lacks rgb, depth or split"}
    assert list(by_id(open_reader(f"pairs:{tmp_path}", "all"))) == ["f0", "f1", "f2", "f3"]


def test_pairs_by_name(tmp_path):
    for name in ("x/a", "b", "only_rgb"):
        picture(tmp_path / f"rgb/{name}.jpg")
    for name in ("x/a", "b", "only_depth"):
        depth_map(tmp_path / f"depth/{name}.png", np.array([[0, 500, 65535]] * 4).repeat(2, axis=1))
    reader = open_reader(f"pairs:{tmp_path}@all", "train")
    items = by_id(reader)
    assert list(items) == ["b", "x/a"]
    np.testing.assert_array_equal(np.unique(items["b"].depth), np.array([0, 0.5, 65.535], np.float32))
    assert reasons(reader) == {"only_depth": "rgb/only_depth.* is missing", "only_rgb": "depth/only_rgb.* is missing"}


def test_pairs_bad_depth(tmp_path):
    for name in ("size", "eight_bit", "truncated", "leaves"):
        picture(tmp_path / f"data/rgb/{name}.png")
    depth_map(tmp_path / "data/depth/size.png", np.ones((6, 4)))
    Image.new("L", (6, 4)).save(tmp_path / "data/depth/eight_bit.png")
    whole = depth_map(tmp_path / "data/depth/truncated.png", np.arange(24).reshape(4, 6)).read_bytes()
    (tmp_path / "data/depth/truncated.png").write_bytes(whole[:50])
    outside = depth_map(tmp_path / "outside.png", np.ones((4, 6)))
    (tmp_path / "data/depth/leaves.png").symlink_to(outside)
    problems = reasons(open_reader(f"pairs:{tmp_path}/data@all", "train"))
    assert "depth is 6x4, the image 4x6" in problems["size"]
    assert "16-bit" in problems["eight_bit"]
    assert problems["truncated"]
    assert "leaves the data folder" in problems["leaves"]


def test_pairs_in_another_unit_are_refused(tmp_path):
    write_lines(tmp_path / "frames.json", {"depth_unit": "metre", "frames": []})
    with pytest.raises(UserError, match="millimetres"):
        open_reader(f"pairs:{tmp_path}", "train")


@needs_real_data
def test_pairs_read_the_real_frames():
    counts = {split: len(open_reader(f"pairs:{REAL}/data/depth", split)) for split in ("train", "val", "test", "all")}
    assert counts == {"train": 260, "val": 61, "test": 17, "all": 338}
    test = open_reader(f"pairs:{REAL}/data/depth", "test")
    assert not reasons(test)
    frames = {frame["id"]: frame for frame in json.loads(Path(f"{REAL}/data/depth/frames.json").read_text())["frames"]}
    for item in test:
        assert item.depth.max() == pytest.approx(frames[item.id]["depth_mm_max"] / 1000)
        assert np.mean(item.depth > 0) == pytest.approx(frames[item.id]["valid_fraction"], abs=1e-3)


# --------------------------------------------------------------------------------------------------------- hard inputs


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    Image.new("L", (6, 4), 77).save(tmp_path / "grey.png")
    Image.new("RGBA", (6, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    Image.fromarray(np.full((4, 6), 257 * 50, np.uint16)).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "pixel.png")
    items = by_id(open_reader(f"folder:{tmp_path}@all", "train"))
    assert len(items) == 6
    assert all(item.image.dtype == np.uint8 and item.image.shape[2] == 3 for item in items.values())
    assert {id for id, item in items.items() if item.grey} == {"grey.png", "deep.png"}
    assert np.all(items["grey.png"].image == 77)
    assert np.all(items["clear.png"].image == 255)
    assert items["cmyk.jpg"].image[0, 0].argmax() == 0
    assert np.all(items["deep.png"].image == 50)
    assert items["turned.jpg"].image.shape == (6, 4, 3)
    assert items["pixel.png"].image.tolist() == [[[1, 2, 3]]]


def test_pictures_that_cannot_be_read_are_bad_items_and_stop_nothing(tmp_path):
    picture(tmp_path / "good.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for name in ("truncated.jpg", "truncated.png"):
        noise.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:900])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    (tmp_path / "huge.png").write_bytes(png_that_claims(60_000, 60_000))
    (tmp_path / "folder.png").mkdir()
    reader = open_reader(f"folder:{tmp_path}@all", "train")
    assert list(by_id(reader)) == ["good.png"]
    problems = reasons(reader)
    assert set(problems) == {"truncated.jpg", "truncated.png", "empty.jpg", "text.jpg", "huge.png"}
    assert all(problems.values())
    assert "pixels" in problems["huge.png"]


def test_captions_of_every_script_survive_and_lone_surrogates_are_replaced(tmp_path):
    texts = [
        "👩🏽‍🚀 rides 🐎",
        "قطة سوداء على السرير",
        "ein grüner Würfel",
        "a\u2028b\tc",
        "x" * 10_000,
        "half \ud83d pair",
    ]
    for number in range(len(texts)):
        picture(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "caption": text} for number, text in enumerate(texts)]
    reader = open_reader(f"jsonl:{write_lines(tmp_path / 'x.jsonl', *rows)}@all", "train")
    captions = [item.captions[0] for item in reader]
    assert captions[:3] == texts[:3]
    assert captions[3] == "a b c"
    assert len(captions[4]) == 10_000
    assert captions[5] == "half \ufffd pair"
    assert "".join(captions).encode()
    assert reader.fingerprint()


def test_captions_that_are_not_text_are_refused():
    assert clean_captions(None) == clean_captions([None, ""]) == ()
    for values in (3, [3], {"text": "x"}, [["x"]]):
        with pytest.raises(ValueError, match="not text"):
            clean_captions(values)


# ------------------------------------------------------------------------------------ order, choice and fingerprint


def numbered_folder(folder: Path, count: int = 12) -> Path:
    for number in range(count):
        picture(folder / f"{number:02d}.png", colour=number)
    return folder


def test_ids_and_fingerprint_do_not_depend_on_location_or_time(tmp_path):
    first = numbered_folder(tmp_path / "first")
    second = tmp_path / "deep/er/second"
    shutil.copytree(first, second)
    for number, file in enumerate(sorted(second.iterdir(), reverse=True)):
        os.utime(file, (number, number))
    readers = [open_reader(f"folder:{folder}@all", "train") for folder in (first, second)]
    assert readers[0].ids == readers[1].ids
    assert readers[0].fingerprint() == readers[1].fingerprint()
    assert len(readers[0].fingerprint()) == 32


@pytest.mark.parametrize("change", ["name", "content", "caption", "removed"])
def test_fingerprint_follows_content(tmp_path, change):
    folder = numbered_folder(tmp_path)
    (folder / "03.txt").write_text("a cat")
    before = open_reader(f"folder:{folder}@all", "train").fingerprint()
    if change == "name":
        (folder / "05.png").rename(folder / "05b.png")
    elif change == "content":
        data = bytearray((folder / "05.png").read_bytes())
        data[-20] ^= 1
        (folder / "05.png").write_bytes(data)
    elif change == "caption":
        (folder / "03.txt").write_text("a dog")
    else:
        (folder / "05.png").unlink()
    assert open_reader(f"folder:{folder}@all", "train").fingerprint() != before


def test_fingerprints_differ_between_splits_and_sizes_of_scenes():
    prints = {
        open_reader("scenes", split, image_size=size, limit=limit).fingerprint()
        for split, size, limit in (("train", 16, 4), ("val", 16, 4), ("train", 24, 4), ("train", 16, 5))
    }
    assert len(prints) == 4


def test_limit_keeps_the_order_and_is_chosen_by_the_seed(tmp_path):
    folder = numbered_folder(tmp_path, 40)
    everything = open_reader(f"folder:{folder}@all", "train").ids
    choices = [open_reader(f"folder:{folder}@all", "train", limit=10, seed=seed).ids for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2]
    assert [id for id in everything if id in choices[0]] == choices[0]
    assert set(open_reader(f"folder:{folder}@all", "train", limit=5).ids) < set(choices[0])
    assert open_reader(f"folder:{folder}@all", "train", limit=1000).ids == everything


def test_splits_do_not_depend_on_the_seed(tmp_path):
    folder = numbered_folder(tmp_path, 30)
    assert open_reader(f"folder:{folder}", "test", seed=0).ids == open_reader(f"folder:{folder}", "test", seed=1).ids


@pytest.mark.parametrize("spec", ["scenes", "skimage", "folder"])
def test_readers_can_be_pickled(tmp_path, spec):
    reader = open_reader(f"folder:{numbered_folder(tmp_path)}@all" if spec == "folder" else spec, "train", limit=3)
    again = pickle.loads(pickle.dumps(reader))
    assert again.ids == reader.ids
    np.testing.assert_array_equal(again[1].image, reader[1].image)


def test_bad_items_can_be_pickled():
    bad = pickle.loads(pickle.dumps(BadItem("a", "because")))
    assert (bad.id, bad.reason, str(bad)) == ("a", "because", "a: because")
