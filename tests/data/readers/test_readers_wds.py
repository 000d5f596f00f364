"""Shards of LAION's kind: what is in them, and that they are shuffled, divided and resumed like any other data."""

import io
import json
import pickle
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.training.stream import MicroBatches, Positions
from crossflow.data.dataset import Examples
from crossflow.data.item import BadItem
from crossflow.data.readers import open_reader, require, samples, shards, tar_index


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
        ("pipe:aws s3 cp x -", "output of programs is not read"),
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
    plain = tar_index._scan
    monkeypatch.setattr(
        tar_index, "_scan", lambda *arguments: scanned.append(Path(arguments[0].name).name) or plain(*arguments)
    )
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


def test_a_shard_that_is_not_a_tar_file_is_reported_as_damaged(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/0.tar").write_bytes(b"<html>not found</html>" * 100)
    reader = open_reader(f"wds:{tmp_path}/data", "all")
    assert "damaged after 0 samples" in reader.problems["0/(truncated)"]


# -- an index on disk


@pytest.fixture
def large(monkeypatch) -> None:
    """Shards of any size have an index on disk, which is read in small parts."""
    monkeypatch.setattr(samples, "LARGEST_IN_MEMORY", -1)
    monkeypatch.setattr(samples, "CHUNK", 7)


def content(spec: str, split: str) -> list:
    reader = open_reader(spec, split, limit=30, seed=2)
    return [
        list(reader.ids),
        reader.problems,
        reader.fields,
        reader.fingerprint(),
        reader.captions(3),
        reader[3].captions,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("by_folder", [False, True])
def test_an_index_on_disk_has_the_samples_of_one_in_memory(tmp_path, monkeypatch, large, by_folder):
    folder = laion(tmp_path / "data", each=40)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:30_000])
    for number in range(4 if by_folder else 0):
        (folder / ("train", "val", "train", "train")[number]).mkdir(exist_ok=True)
        (folder / f"{number:05d}.tar").rename(folder / ("train", "val", "train", "train")[number] / f"{number}.tar")
    written = [content(f"wds:{folder}", split) for split in ("all", "train")]
    monkeypatch.setattr(tar_index, "_scan", None)
    assert [content(f"wds:{folder}", split) for split in ("all", "train")] == written
    reader = open_reader(f"wds:{folder}", "train")
    copied = pickle.loads(pickle.dumps(reader))
    assert copied[13].captions == reader[13].captions
    assert len(pickle.dumps(reader)) < 3000 + len(str(tmp_path)) * 20
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert [content(f"wds:{folder}", split) for split in ("all", "train")] == written


# -- shards in a store


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Four shards of 25 samples each in the store of fsspec that lies in memory."""
    monkeypatch.setattr(shards, "WAITS", (0.0, 0.0))
    system = fsspec.filesystem("memory")
    for file in laion(tmp_path / "data").glob("*.tar"):
        system.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def until(condition) -> None:
    stop = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.01)


@pytest.mark.slow
def test_remote_shards_have_the_samples_of_local_ones(tmp_path, store):
    local = open_reader(f"wds:{tmp_path}/data", "train")
    for place in ("bucket", "bucket/", "bucket/*.tar", "bucket/{00000..00003}.tar"):
        remote = open_reader(f"wds:memory://{place}", "train")
        assert list(remote.ids) == list(local.ids)
    assert remote[5].captions == local[5].captions
    assert np.array_equal(remote[5].image, local[5].image)
    copied = pickle.loads(pickle.dumps(remote))
    assert copied[5].captions == local[5].captions


@pytest.mark.slow
def test_a_shard_is_downloaded_once(tmp_path, store, monkeypatch):
    downloads = []
    plain = type(store).get_file
    monkeypatch.setattr(
        type(store), "get_file", lambda self, path, *rest: downloads.append(path) or plain(self, path, *rest)
    )
    reader = open_reader("wds:memory://bucket", "all")
    assert [item.id for item in reader.load(range(100))] == list(reader.ids)
    open_reader("wds:memory://bucket", "all").load(range(100))
    assert sorted(path[-9:] for path in downloads) == [f"{number:05d}.tar" for number in range(4)]
    store.pipe_file("/bucket/00000.tar", (tmp_path / "data/00001.tar").read_bytes())
    assert open_reader("wds:memory://bucket", "all").ids[0] == "00000/000000025", "another version has another index"


@pytest.mark.slow
def test_an_epoch_of_remote_shards_uses_few_at_a_time_and_reads_the_next_ones_ahead(store, cache):
    reader = open_reader("wds:memory://bucket?shuffle=1", "all")
    data = MicroBatches(Examples(reader, lambda item, chance: item.id, seed=0, cache=False), 3, latent_shape=(1,))
    ids = [data.data[data.example_at(position)] for position in range(200)]
    assert sorted(ids[:100]) == sorted(ids[100:]) == list(reader.ids)
    used = [[id.split("/")[0] for id in ids[start : start + 25]] for start in range(0, 200, 25)]
    assert [len(set(shards)) for shards in used] == [1] * 8, "a shard after the other, each shuffled"
    assert ids[:25] != sorted(ids[:25])
    for file in (cache / "crossflow/shards").glob("*.tar"):
        file.unlink()
    data.data[data.example_at(25)]
    until(lambda: len(list((cache / "crossflow/shards").glob("*.tar"))) == 2)


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_an_order_of_shards_is_a_permutation(width):
    bounds = np.array([0, 5, 5, 18, 30, 31, 60, 100])
    order = samples.ShardOrder(bounds, 1, 2, width)
    indices = order[np.arange(100)]
    assert sorted(indices.tolist()) == list(range(100))
    assert [order.place_of(index) for index in indices.tolist()] == list(range(100))
    assert indices.tolist() != samples.ShardOrder(bounds, 1, 3, width)[np.arange(100)].tolist()


def test_the_least_recently_used_shards_make_room(store, cache):
    size = store.size("/bucket/00000.tar")
    reader = open_reader(f"wds:memory://bucket?shuffle=1&keep={2.5 * size / 1e9}", "all")
    for index in (0, 30, 60, 99, 0):
        assert reader[index].captions == (f"picture {index}",)
        assert sum(file.stat().st_size for file in (cache / "crossflow/shards").glob("*.tar")) <= 2.5 * size
    with pytest.raises(UserError, match=r"are in use at the same time; .*keep=GIGABYTES"):
        open_reader(f"wds:memory://bucket?keep={2.5 * size / 1e9}", "all")


def test_a_failed_download_is_tried_again_and_never_a_bad_item(store, cache, monkeypatch):
    reader = open_reader("wds:memory://bucket", "all")
    for file in (cache / "crossflow/shards").glob("*.tar"):
        file.unlink()
    failures, plain = [OSError("reset by peer"), RuntimeError("timeout")], type(store).get_file

    def get_file(self, path, local):
        if failures:
            raise failures.pop()
        plain(self, path, local)

    monkeypatch.setattr(type(store), "get_file", get_file)
    assert reader[0].captions == ("picture 0",)
    failures += [OSError("no route")] * 40
    with pytest.raises(UserError, match=r"00003\.tar cannot be downloaded .*no route"):
        reader[99]


def test_a_store_that_cannot_be_reached_is_a_message(monkeypatch):
    with pytest.raises(UserError, match=r"no \.tar files|cannot be listed"):
        open_reader("wds:memory://nothing", "all")
    with pytest.raises(UserError, match="cannot be reached"):
        open_reader("wds:memory://nothing/0.tar", "all")
    with pytest.raises(UserError, match="nosuch:// cannot be read"):
        open_reader("wds:nosuch://bucket/0.tar", "all")


# -- training from damaged shards


def damaged(folder: Path) -> Path:
    """Three shards of larger pictures: one whole, one with a picture that is none, one truncated in its seventh."""
    generator = np.random.default_rng(0)
    for number in range(3):
        members = {}
        for place in range(10):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 255, (40, 40, 3), np.uint8)).save(file, format="JPEG")
            members[f"{place}.jpg"] = file.getvalue() if (number, place) != (1, 4) else b"<html>not found</html>"
        file = shard(folder / f"{number}.tar", members)
    with tarfile.open(file) as tar:
        cut = tar.getmember("6.jpg").offset_data + 10
    file.write_bytes(file.read_bytes()[:cut])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "file://"], ids=["local", "fsspec"])
def test_a_training_names_what_is_damaged_in_its_shards_and_goes_on(
    tmp_path, monkeypatch, caplog, capsys, tiny_settings, scheme
):
    monkeypatch.setattr(shards, "WAITS", ())
    spec, run = f"wds:{scheme}{damaged(tmp_path / 'data')}/{{0..2}}.tar@all", tmp_path / "run"
    steps = ["train.steps=8", "train.batch_size=4", "data.num_train=null", "data.val=scenes"]
    argv = ["train", "--task", "sr", "--data", spec, *tiny_settings("sr"), *steps, "--output", str(run)]
    assert main([*argv, "data.max_bad=0.05"]) == 2
    message = capsys.readouterr().err
    assert "2 of 27 items are bad so far; the limit is 5% (data.max_bad)" in message
    assert "1/4: " in message
    assert "2/(truncated): the shard is truncated in '6.jpg'; the samples after it are lost" in message
    assert not (run / "model.safetensors").exists()
    caplog.clear()
    assert main([*argv, "data.max_bad=0.1"]) == 0
    warnings = [record.getMessage() for record in caplog.records if "skipping item" in record.getMessage()]
    assert len(warnings) == 2
    assert "1/4: " in warnings[1]
    assert "2/(truncated)" in warnings[0]
    assert '"step": 8' in (run / "metrics.jsonl").read_text()
