"""Data sets of the library `datasets`, all in local folders: no network is needed or used."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.data.item import BadItem
from crossflow.data.readers import open_reader, require


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, 90, 30)).save(file, format="PNG")
    return file.getvalue()


def rows(count: int, start: int = 0, **columns: object) -> datasets.Dataset:
    numbers = range(start, start + count)
    content = {
        "image": [{"bytes": png(number), "path": None} for number in numbers],
        "text": [f"picture {number}" for number in numbers],
        "name": [f"n{number}" for number in numbers],
    }
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), name=datasets.Value("string"))
    return datasets.Dataset.from_dict(content, features=features)


@pytest.fixture
def saved(tmp_path) -> Path:
    splits = {"train": rows(6), "validation": rows(2, 6), "test": rows(3, 8)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_data_sets_keep_their_splits(saved):
    reader = require(open_reader(str(saved), "val"), {"image", "captions"}, "t2i")
    assert reader.spec.startswith("hf:")
    assert len(reader) == 2
    assert reader[1].captions == reader.captions(1) == ("picture 7",)
    assert tuple(reader[1].image[0, 0]) == (7, 90, 30)
    everything = open_reader(f"hf:{saved}?id=name", "all")
    assert list(everything.ids)[-1] == "test/n10"
    assert len({open_reader(f"hf:{saved}", split).fingerprint() for split in ("train", "val", "test", "all")}) == 4
    assert pickle.loads(pickle.dumps(reader))[0].id == reader[0].id


def test_parquet_files_of_one_split_are_divided_by_a_hash_of_the_rows(tmp_path):
    (tmp_path / "data").mkdir()
    rows(40).to_parquet(tmp_path / "data/train.parquet")
    ids = {split: set(open_reader(f"hf:{tmp_path}/data?id=name", split).ids) for split in ("train", "val", "test")}
    assert len(ids["val"]) >= 1
    assert sum(map(len, ids.values())) == len(set.union(*ids.values()))
    whole = open_reader(f"hf:{tmp_path}/data?id=name", "all")
    assert len(whole) == 40
    assert ids["train"] < set(whole.ids)
    assert len(open_reader(f"hf:{tmp_path}/data", "train", limit=5)) == 5


def test_a_lone_test_split_is_scored_as_a_whole_and_never_trained_on(tmp_path):
    datasets.DatasetDict({"test": rows(4)}).save_to_disk(tmp_path / "own")
    assert len(open_reader(f"hf:{tmp_path}/own", "test")) == 4
    with pytest.raises(UserError, match="has test but nothing for 'train'"):
        open_reader(f"hf:{tmp_path}/own", "train")


def test_a_stream_takes_only_the_first_rows(tmp_path):
    (tmp_path / "data").mkdir()
    rows(40).to_parquet(tmp_path / "data/train.parquet")
    rows(5, 40).to_parquet(tmp_path / "data/test.parquet")
    rows(2, 50).to_parquet(tmp_path / "data/validation.parquet")
    reader = open_reader(f"hf:{tmp_path}/data?stream=7", "train")
    assert len(reader) == 7
    assert reader[6].captions == reader.captions(6) == ("picture 6",)
    assert tuple(reader[6].image[0, 0]) == (6, 90, 30)
    assert len(open_reader(f"hf:{tmp_path}/data?stream=7", "test")) == 5
    assert reader.fingerprint() == open_reader(f"hf:{tmp_path}/data?stream=7", "train").fingerprint()


def test_validation_rows_come_from_train_where_only_train_and_test_are_published(saved, tmp_path):
    datasets.DatasetDict({"train": rows(60), "test": rows(3, 60)}).save_to_disk(tmp_path / "two")
    ids = {split: open_reader(f"hf:{tmp_path}/two", split).ids for split in ("train", "val", "test")}
    assert 1 <= len(ids["val"]) <= 4
    assert sorted([*ids["train"], *ids["val"]]) == [f"{row:08d}" for row in range(60)]
    assert len(ids["test"]) == 3
    assert len(open_reader(f"hf:{saved}", "train")) == 6  # which has a validation split


def test_columns_can_be_named(saved, tmp_path):
    data = rows(3).rename_columns({"image": "photograph", "text": "words"})
    data.save_to_disk(tmp_path / "own")
    reader = open_reader(f"hf:{tmp_path}/own", "all")
    assert reader.fields == {"image"}  # a picture is known by its type, words are not by theirs
    reader = open_reader(f"hf:{tmp_path}/own?caption=words", "all")
    assert reader[2].captions == ("picture 2",)
    with pytest.raises(UserError, match="no column 'word'; it has photograph, words, name"):
        open_reader(f"hf:{tmp_path}/own?caption=word", "all")
    with pytest.raises(UserError, match="Did you mean 'caption'"):
        open_reader(f"hf:{tmp_path}/own?captoin=words", "all")


def test_lists_of_captions_and_coco_objects_are_read(tmp_path):
    content = {"image": [{"bytes": png(1), "path": None}] * 2, "sentences": [[{"raw": "a"}, {"raw": "b"}], []]}
    features = datasets.Features(image=datasets.Image(), sentences=datasets.List({"raw": datasets.Value("string")}))
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "own")
    reader = require(open_reader(f"hf:{tmp_path}/own", "all"), {"image", "captions"}, "caption")
    assert reader[0].captions == ("a", "b")
    with pytest.raises(BadItem, match="has no captions"):
        reader[1]


def test_depth_in_millimetres_and_in_metres_is_read(tmp_path):
    units = np.arange(24, dtype=np.uint16).reshape(4, 6) * 100
    file, metres = io.BytesIO(), io.BytesIO()
    Image.fromarray(units).save(file, format="PNG")
    Image.fromarray((units / 100).astype(np.float32)).save(metres, format="TIFF")
    pairs = [{"bytes": buffer.getvalue(), "path": None} for buffer in (file, metres)]
    content = {"image": [{"bytes": png(1), "path": None}] * 2, "depth_map": pairs}
    features = datasets.Features(image=datasets.Image(), depth_map=datasets.Image())
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "own")
    reader = require(open_reader(f"hf:{tmp_path}/own", "all"), {"image", "depth"}, "depth")
    np.testing.assert_allclose(reader[0].depth, units / 1000)
    np.testing.assert_allclose(reader[1].depth, units / 100)
    np.testing.assert_allclose(open_reader(f"hf:{tmp_path}/own?units=256", "all")[0].depth, units / 256)


@pytest.mark.parametrize("stream", ["", "?stream=2"])
def test_pictures_in_archives_are_read(tmp_path, stream):
    """A folder of pictures with their captions, zipped, and a tar of webdataset, as both lie on the hub."""
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped/train.zip", "w") as archive:
        lines = [json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) for number in range(3)]
        archive.writestr("metadata.jsonl", "\n".join(lines))
        for number in range(3):
            archive.writestr(f"{number}.png", png(number))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/train-0000.tar", "w") as shard:
        for number in range(3):
            for name, content in ((f"{number}.png", png(number)), (f"{number}.txt", f"picture {number}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    for kind in ("zipped", "shards"):
        reader = require(open_reader(f"hf:{tmp_path}/{kind}{stream}", "all"), {"image", "captions"}, "t2i")
        assert len(reader) == (2 if stream else 3)
        assert tuple(reader[1].image[0, 0]) == (1, 90, 30)
        assert reader[1].captions == ("picture 1",)
        assert len(reader.fingerprint()) == 32


def test_bad_rows_are_bad_items(tmp_path):
    content = {"image": [{"bytes": png(1), "path": None}, {"bytes": b"broken", "path": None}, None], "text": ["a"] * 3}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "own")
    loaded = open_reader(f"hf:{tmp_path}/own", "all").load(range(3))
    assert [isinstance(item, BadItem) for item in loaded] == [False, True, True]
    assert loaded[2].reason == "has no picture"


def test_unavailable_data_give_a_one_paragraph_error(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    for spec in ("hf:", f"hf:{tmp_path}/empty", "hf:nobody/has-such-a-data-set"):
        with pytest.raises(UserError, match="hf:") as error:
            open_reader(spec, "train")
        assert "\n" not in str(error.value)
    rows(3).map(lambda row: {"name": "same"}).save_to_disk(tmp_path / "same")
    with pytest.raises(UserError, match="unique"):
        open_reader(f"hf:{tmp_path}/same?id=name", "all")


@pytest.mark.parametrize(
    "address", ["{}", "file://{}", "file:{}", "~/secret.png", "zip://a.png::{}", "http://example.com/a.png"]
)
def test_a_row_cannot_name_a_file_outside_the_data(monkeypatch, tmp_path: Path, address: str) -> None:
    from crossflow.data.readers.hf import _encoded

    secret, data = tmp_path / "secret.png", tmp_path / "data"
    data.mkdir()
    secret.write_bytes(b"secret")
    with pytest.raises(ValueError, match="outside of the data"):
        _encoded({"bytes": None, "path": address.format(secret)}, str(data))
    monkeypatch.chdir(data)  # below it lies whatever is taken for a relative path
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="outside of the data"):
        _encoded({"bytes": None, "path": address.format(secret)}, ".")
    (data / "mine.png").write_bytes(b"mine")
    assert _encoded({"bytes": None, "path": str(data / "mine.png")}, str(data)) == b"mine"
    assert _encoded({"bytes": None, "path": "mine.png"}, ".") == b"mine"
