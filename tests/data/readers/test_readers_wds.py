"""Shards of LAION's kind: what is in them, and that they are shuffled, divided and resumed like any other data."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from crossflow.core.errors import UserError
from crossflow.core.training.stream import MicroBatches, Positions
from crossflow.data.dataset import Examples
from crossflow.data.item import BadItem
from crossflow.data.readers import open_reader, require, wds


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jpeg(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (colour, colour, colour)).save(file, format="JPEG")
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, caption: str | None = None) -> dict[str, bytes]:
    """As img2dataset writes it."""
    key, text = f"{number:09d}", caption or f"picture {number}"
    about = {"caption": text, "status": "success", "error_message": None, "width": 6, "height": 4, "key": key}
    return {f"{key}.jpg": jpeg(number % 256), f"{key}.json": json.dumps(about).encode(), f"{key}.txt": text.encode()}


def laion(folder: Path, shards: int = 4, each: int = 25) -> Path:
    for number in range(shards):
        members = {}
        for place in range(each):
            members |= sample(each * number + place)
        shard(folder / f"{number:05d}.tar", members)
        (folder / f"{number:05d}_stats.json").write_text("{}")
        (folder / f"{number:05d}.parquet").write_bytes(b"PAR1")
    return folder


def test_samples_of_all_shards_are_read(tmp_path):
    reader = require(open_reader(f"{laion(tmp_path / 'data')}@all", "train"), {"image", "captions"}, "t2i")
    assert len(reader) == 100
    assert reader.ids[26] == "00001/000000026"
    assert reader[26].captions == ("picture 26",)
    assert abs(int(reader[26].image.mean()) - 26) <= 1
    assert reader.captions(99) == ("picture 99",)
    assert not reader.problems
    assert list(reader.ids[:2]) == ["00000/000000000", "00000/000000001"]


def test_splits_are_by_name_and_disjoint(tmp_path):
    folder = laion(tmp_path / "data")
    ids = {split: set(open_reader(f"wds:{folder}", split).ids) for split in ("train", "val", "test")}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 100
    assert 75 < len(ids["train"]) < 100
    few = open_reader(f"wds:{folder}", "train", limit=7)
    assert len(few) == 7
    assert set(few.ids) < ids["train"]
    for number, split in enumerate(("train", "val")):
        (tmp_path / f"sorted/{split}").mkdir(parents=True)
        (folder / f"0000{number}.tar").rename(tmp_path / f"sorted/{split}/0.tar")
    assert open_reader(f"wds:{tmp_path}/sorted", "val").ids[0] == "val/0/000000025"
    assert open_reader(f"wds:{tmp_path}/sorted/val@all", "train").ids[0] == "val/0/000000025"
    with pytest.raises(UserError, match="shards for train, val but none for 'test'"):
        open_reader(f"wds:{tmp_path}/sorted", "test")


def test_shards_can_be_given_by_ranges_and_patterns(tmp_path):
    folder = laion(tmp_path / "data", each=2)
    assert len(open_reader(f"wds:{folder}/{{00001..00002}}.tar@all", "train")) == 4
    assert len(open_reader(f"wds:{folder}/0000{{1,3}}.tar@all", "train")) == 4
    assert len(open_reader(f"wds:{folder}/{{00000..00003..2}}.tar@all", "train")) == 4
    assert len(open_reader(f"wds:{folder}/*3.tar@all", "train")) == 2
    assert len(open_reader(f"wds:{folder}/00000.tar@all", "train")) == 2
    with pytest.raises(UserError, match=r"2 shards do not exist, such as .*00004\.tar"):
        open_reader(f"wds:{folder}/{{00003..00005}}.tar", "train")
    for place, message in (
        ("https://x.org/0.tar", "another machine.*download"),
        ("pipe:aws s3 cp x -", "another machine"),
        (f"{folder}/{{00000..00003.tar", "not a valid brace pattern"),
        (f"{folder}/*9.tar", r"no \.tar files"),
        (f"{folder}/00000.parquet", "not a plain .tar"),
    ):
        with pytest.raises(UserError, match=message):
            open_reader(f"wds:{place}", "train")


def test_samples_are_shuffled_across_shards_divided_exactly_and_resumed(tmp_path):
    reader = open_reader(f"wds:{laion(tmp_path / 'data')}@all", "train")
    data = MicroBatches(Examples(reader, lambda item, chance: item.id, seed=0), seed=3, latent_shape=(1,))

    def ids_of(start: int, stop: int, rank: int, ranks: int) -> list[str]:
        places = Positions(start, stop, 20, 1, rank, ranks)
        return [data.data[data.example_at(p)] for _, positions in places for p in positions]

    alone = ids_of(0, 10, 0, 1)
    assert sorted(alone[:100]) == sorted(alone[100:]) == list(reader.ids)
    assert alone[:100] != alone[100:]
    assert len({id.split("/")[0] for id in alone[:20]}) == 4  # one batch draws on all shards
    two = [ids_of(0, 5, rank, 2) for rank in range(2)]
    assert not set(two[0]) & set(two[1])
    assert sorted(two[0] + two[1]) == list(reader.ids)
    assert ids_of(4, 10, 0, 1) == alone[80:]  # from where a run was stopped


def test_workers_of_a_loader_read_what_one_process_reads(tmp_path):
    reader = open_reader(f"wds:{laion(tmp_path / 'data', shards=2, each=10)}@all", "train")
    data = Examples(reader, lambda item, chance: (item.id, int(item.image.sum())), seed=0, cache=False)
    loader = DataLoader(data, batch_size=None, num_workers=2, sampler=range(20), collate_fn=tuple)
    assert list(loader) == [data[index] for index in range(20)]
    copied = pickle.loads(pickle.dumps(reader))
    assert copied[13].captions == reader[13].captions


def test_bad_samples_are_listed_with_reasons(tmp_path):
    members = sample(0) | sample(1) | sample(2) | sample(3) | sample(4)
    members["000000001.jpg"] = b"no picture"
    del members["000000002.jpg"]
    members["000000003.txt"] = b"  "
    about = {"status": "failed_to_download", "error_message": "HTTP Error 404"}
    members["000000004.json"] = json.dumps(about).encode()
    folder = shard(tmp_path / "data/0.tar", members).parent
    reader = open_reader(f"wds:{folder}@all", "train")
    assert reader.problems == {"0/000000002": "has no picture"}
    needed = require(reader, {"image", "captions"}, "t2i")
    bad = {item.id[-1]: item.reason for item in needed.load(range(5)) if isinstance(item, BadItem)}
    assert sorted(bad) == ["1", "2", "3", "4"]
    assert "not a picture" in bad["1"]
    assert bad["3"] == "has no caption"
    assert "HTTP Error 404" in bad["4"]


@pytest.mark.parametrize("cut", ["in a picture", "in a header"])
def test_a_truncated_shard_keeps_its_intact_samples_and_reports_the_loss(tmp_path, cut):
    folder = laion(tmp_path / "data", shards=2, each=5)
    whole = (folder / "00001.tar").read_bytes()
    with tarfile.open(folder / "00001.tar") as tar:
        third = tar.getmember("000000008.jpg")
    (folder / "00001.tar").write_bytes(whole[: third.offset_data + 10 if cut == "in a picture" else third.offset + 100])
    for split in ("all", "train"):
        reader = open_reader(f"wds:{folder}", split)
        assert "00001/(truncated)" in reader.problems
    assert len(open_reader(f"wds:{folder}", "all")) == 5 + 3 + 1


def test_the_index_is_rebuilt_only_when_a_shard_changes(tmp_path, cache, monkeypatch):
    folder = laion(tmp_path / "data", shards=2, each=3)
    scanned = []
    plain = wds._scan
    monkeypatch.setattr(wds, "_scan", lambda *arguments: scanned.append(arguments[0].name) or plain(*arguments))
    before = open_reader(f"wds:{folder}", "all").fingerprint()
    assert open_reader(f"wds:{folder}", "all").fingerprint() == before
    assert scanned == ["00000.tar", "00001.tar"]
    (folder / "00001.tar").unlink()
    shard(folder / "00001.tar", sample(7))
    assert len(open_reader(f"wds:{folder}", "all")) == 4
    assert scanned == ["00000.tar", "00001.tar", "00001.tar"]
    assert open_reader(f"wds:{folder}", "all").fingerprint() != before
    for file in cache.rglob("*.npy"):
        file.write_bytes(b"damaged")
    assert open_reader(f"wds:{folder}", "all")[3].captions == ("picture 7",)


def test_a_field_of_the_json_can_be_the_caption(tmp_path):
    members = sample(0)
    members["000000000.json"] = json.dumps({"recaption": "a red cube"}).encode()
    folder = shard(tmp_path / "data/0.tar", members).parent
    assert open_reader(f"wds:{folder}?caption=recaption@all", "train")[0].captions == ("a red cube",)
    assert open_reader(f"wds:{folder}@all", "train")[0].captions == ("picture 0",)


def test_other_files_in_a_shard_are_ignored(tmp_path):
    file = shard(tmp_path / "data/0.tar", sample(0) | {"README": b"x", ".hidden": b"y", "1.cls": b"3"})
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    reader = open_reader(f"wds:{tmp_path}/data@all", "train")
    assert reader.ids[:] == ["0/000000000"]
    assert np.array_equal(reader.rows["shard"], [0])


def test_a_shard_that_is_not_a_tar_file_is_reported_as_damaged(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.tar").write_bytes(b"<html>not found</html>" * 100)
    reader = open_reader(f"wds:{tmp_path}/data", "all")
    assert "damaged after 0 samples" in reader.problems["0/(truncated)"]
