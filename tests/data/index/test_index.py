"""The index of a large file: the same records as of a small one, built once, whatever happens to the process."""

import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.data.index import items, lines, merge
from crossflow.data.readers import jsonl, open_reader

NUM = 300


@pytest.fixture(autouse=True)
def index_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files are indexed too, in parts of a few lines; returns the folder of the indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(items, "LARGEST_IN_MEMORY", -1)
    monkeypatch.setattr(lines, "PART_BYTES", 1000)
    monkeypatch.setattr(merge, "CHUNK", 17)
    return tmp_path / "cache/crossflow/index"


def written(path: Path, rows: list[dict | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pictures(tmp_path: Path, num: int = NUM) -> Path:
    return written(
        tmp_path / "data/x.jsonl", [{"image": f"{place}.png", "caption": f"picture {place}"} for place in range(num)]
    )


def content(file: Path, split: str, **choice: int) -> list:
    reader = open_reader(f"jsonl:{file}", split, **choice)
    return [list(reader.ids), list(reader.records), reader.problems, reader.fields, reader.fingerprint()]


LINES = st.one_of(
    st.just("{broken"),
    st.just("[1]"),
    st.just(""),
    st.fixed_dictionaries(
        {},
        optional={
            "image": st.sampled_from(["a.png", "./a.png", "b.png", "c/\ud800.png", "d.png", "e.png", ""]),
            "caption": st.sampled_from(["red", "", ["x", " y "], 5, "\ud83d"]),
            "split": st.sampled_from(["train", "val", "dev", "test", "extra"]),
        },
    ),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(LINES, min_size=1, max_size=40), limit=st.sampled_from([None, 2]))
def test_an_index_has_the_records_of_a_file_in_memory(tmp_path_factory, rows, limit):
    file = written(tmp_path_factory.mktemp("data") / "x.jsonl", rows)
    results = []
    for largest in (2**30, -1, -1):  # in memory, built, opened again
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(items, "LARGEST_IN_MEMORY", largest)
            patch.setattr(jsonl, "VERSION", "of this test")
            try:
                results.append([content(file, split, limit=limit, seed=1) for split in ("all", "train", "val")])
            except UserError as error:
                results.append(str(error))
    assert results[0] == results[1] == results[2]


def test_a_second_process_reads_no_line(tmp_path, monkeypatch):
    file = pictures(tmp_path)
    before = content(file, "train", limit=50)
    monkeypatch.setattr(jsonl, "parse_line", lambda *line: pytest.fail(f"reads {line}"))
    assert content(file, "train", limit=50) == before
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(items, "LARGEST_IN_MEMORY", -1)
    reader = open_reader(f"jsonl:{file}", "train")
    copied = pickle.loads(pickle.dumps(reader))
    assert list(copied.records) == list(reader.records)
    assert len(pickle.dumps(reader)) < 3000, "workers map the files instead of receiving their content"


def test_a_changed_file_has_another_index(tmp_path):
    file = pictures(tmp_path)
    assert len(open_reader(f"jsonl:{file}", "all")) == NUM
    with file.open("a") as stream:
        stream.write('{"image": "last.png", "caption": "the last one"}\n')
    assert open_reader(f"jsonl:{file}", "all").ids[-1] == "last.png"


def open_until(file: Path, last: int, counted: Path) -> None:
    """Opens the data; the process ends at once, like a killed one, at line `last`. Counts the lines that it reads."""
    plain = jsonl.parse_line

    def parse(name, number, entry):
        if number == last:
            os._exit(9)
        with counted.open("a") as stream:
            stream.write(f"{number}\n")
        return plain(name, number, entry)

    jsonl.parse_line = parse
    open_reader(f"jsonl:{file}", "all")


def in_processes(*calls: tuple) -> list[int | None]:
    """The exit codes of processes that call `open_until`."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_until, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_a_killed_process_loses_one_part(tmp_path, index_of_any_size):
    file, counted = pictures(tmp_path), tmp_path / "lines"
    assert in_processes((file, 150, counted)) == [9]
    assert len(counted.read_text().split()) == 149
    codes = in_processes((file, 250, counted), (file, 0, counted))  # one may be killed while the other one waits
    assert codes[1] == 0
    assert codes[0] in (9, 0)
    numbers = [int(number) for number in counted.read_text().split()]
    assert set(numbers) == set(range(1, NUM + 1))
    lines_of_a_part = 1000 // len('{"image": "100.png", "caption": "picture 100"}\n') + 1
    assert len(numbers) <= NUM + 2 * lines_of_a_part
    assert not list(index_of_any_size.rglob("part-*"))
    assert [record.captions[0] for record in open_reader(f"jsonl:{file}", "all").records] == [
        f"picture {place}" for place in range(NUM)
    ]


def test_several_processes_build_one_index(tmp_path):
    file, counted = pictures(tmp_path), tmp_path / "lines"
    assert in_processes(*[(file, 0, counted)] * 4) == [0] * 4
    assert sorted(map(int, counted.read_text().split())) == list(range(1, NUM + 1))


@pytest.mark.parametrize("name", ["rows.arrow", "flags.npy", "train.npy", "about.txt"])
def test_a_damaged_index_is_built_again(tmp_path, index_of_any_size, name):
    file = pictures(tmp_path)
    before = content(file, "train")
    (path,) = index_of_any_size.rglob(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert content(file, "train") == before
    assert content(file, "train") == before


def test_an_index_that_cannot_be_written_is_a_message(tmp_path, monkeypatch):
    file = pictures(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(UserError, match=r"index of .* cannot be written .* XDG_CACHE_HOME"):
        open_reader(f"jsonl:{file}", "train")


def test_the_fingerprint_is_kept_until_a_picture_changes(tmp_path, monkeypatch):
    file = pictures(tmp_path, num=20)
    for place in range(20):
        Image.new("RGB", (4, 4), (place, 0, 0)).save(file.parent / f"{place}.png")
    before = open_reader(f"jsonl:{file}", "all").fingerprint()
    reader = open_reader(f"jsonl:{file}", "all")
    monkeypatch.setattr(type(reader.records), "__iter__", None)
    assert reader.fingerprint() == before, "without reading all records"
    monkeypatch.undo()
    monkeypatch.setattr(items, "LARGEST_IN_MEMORY", 2**30)
    assert open_reader(f"jsonl:{file}", "all").fingerprint() == before, "as of a file in memory"
    Image.new("RGB", (4, 4), (0, 9, 0)).save(file.parent / "7.png")
    assert open_reader(f"jsonl:{file}", "all").fingerprint() != before


def test_progress_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("crossflow.data.index.store.SECONDS", 0)
    with caplog.at_level(logging.WARNING):
        open_reader(f"jsonl:{pictures(tmp_path)}", "all").fingerprint()
    assert "reading its lines into an index (only once), 7 % done." in caplog.text
    assert "computing the fingerprint of its files, 50 % done." in caplog.text


@pytest.mark.slow
def test_an_open_index_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", 2**24)
    monkeypatch.setattr(merge, "CHUNK", 2**16)
    file = pictures(tmp_path, num=30_000)
    open_reader(f"jsonl:{file}", "train")
    memory = private_memory()
    reader = open_reader(f"jsonl:{file}", "train")
    places = np.random.default_rng(0).integers(0, len(reader), 10_000).tolist()
    assert all(reader.records[place].captions for place in places)
    assert private_memory() - memory < 10 * 2**20


def private_memory() -> int:
    """Bytes of memory that this process shares with no other one."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
