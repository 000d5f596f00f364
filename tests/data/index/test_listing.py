"""A kept listing: the same records as those in memory, made once, and made again when a file has changed."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from crossflow.data.index import listing
from crossflow.data.readers import coco, folder, open_reader
from crossflow.data.readers.coco import CocoReader
from crossflow.data.readers.folder import FolderReader


@pytest.fixture(autouse=True)
def small_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data are kept too, in batches of a few records, and however young their files are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "CHUNK", 7)
    monkeypatch.setattr(listing, "SETTLED", -(10**18))
    monkeypatch.setattr(folder, "MANY", 0)
    monkeypatch.setattr(coco, "LARGEST_IN_MEMORY", -1)


def pictures(root: Path) -> str:
    """Some with a text, some described in metadata, of which a line is malformed and one has no caption."""
    for number in range(30):
        file = root / f"{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"picture")
        if number % 3 == 0:
            file.with_suffix(".txt").write_text(f"picture {number}\nthe same\n")
    lines = [{"file_name": f"1/{number}.png", "caption": f"line {number}"} for number in range(1, 30, 3)]
    lines += [{"file_name": "2/2.png", "caption": ""}, {"caption": "of nothing"}]
    (root / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return f"folder:{root}"


def annotations(root: Path) -> str:
    """Some images have no caption, one has an id of another, and one no name."""
    (root / "images").mkdir(parents=True)
    images = [{"id": number, "file_name": f"{number:04d}.jpg"} for number in range(30)]
    captions = [{"image_id": number % 25, "caption": f"caption {number}"} for number in range(50)]
    for split in ("train", "val"):
        content = {"images": [*images, images[3], {"id": 99}], "annotations": captions}
        (root / f"captions_{split}.json").write_text(json.dumps(content))
    return f"coco:{root}"


Maker = Callable[[Path], str]
MAKERS = pytest.mark.parametrize("make", [pictures, annotations], ids=["folder", "coco"])


def content(spec: str, split: str, limit: int | None = None) -> list:
    reader = open_reader(spec, split, limit=limit, seed=1)
    needed = reader.with_required(reader.fields & {"captions"})
    return [
        *(list(reader.ids), list(reader.records), reader.problems, reader.fields, reader.fingerprint()),
        *(list(needed.records), needed.problems, reader.root, reader.allowed),
    ]


@MAKERS
@pytest.mark.parametrize("limit", [None, 5])
def test_a_kept_listing_is_that_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Maker, limit: int | None
) -> None:
    spec = make(tmp_path / "data")
    built = [content(spec, split, limit) for split in ("all", "train", "val")]
    with monkeypatch.context() as patch:
        for reader in (FolderReader, CocoReader):
            patch.setattr(reader, "listing", lambda *arguments: pytest.fail("lists the files again"))
        assert [content(spec, split, limit) for split in ("all", "train", "val")] == built
        reader = open_reader(spec, "all")
        assert list(pickle.loads(pickle.dumps(reader)).records) == list(reader.records)
        assert len(pickle.dumps(reader)) < 3000, "workers map the files instead of receiving their content"
    for reader in (FolderReader, CocoReader):
        monkeypatch.setattr(reader, "is_large", lambda *arguments: False)
    assert [content(spec, split, limit) for split in ("all", "train", "val")] == built


def add_picture(root: Path) -> None:
    (root / "1" / "new.png").write_bytes(b"picture")


def add_folder(root: Path) -> None:
    (root / "new").mkdir()
    (root / "new" / "new.png").write_bytes(b"picture")


def rewrite_text(root: Path) -> None:
    (root / "0" / "3.txt").write_text("picture 4\nthe same\n")


def rewrite_metadata(root: Path) -> None:
    path = root / "metadata.jsonl"
    path.write_text(path.read_text().replace("line 4", "line 5"))


def rewrite_annotations(root: Path) -> None:
    path = root / "captions_train.json"
    path.write_text(path.read_text().replace("caption 4", "caption 5"))


@pytest.mark.parametrize(
    ("make", "change"),
    [(pictures, change) for change in (add_picture, add_folder, rewrite_text, rewrite_metadata)]
    + [(annotations, rewrite_annotations)],
)
def test_changed_files_are_listed_again(tmp_path: Path, make: Maker, change: Callable[[Path], None]) -> None:
    spec = make(tmp_path / "data")
    before = content(spec, "all")
    change(tmp_path / "data")
    after = content(spec, "all")
    assert after != before
    assert content(spec, "all") == after


@MAKERS
def test_files_that_have_just_changed_are_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Maker
) -> None:
    """Another change at the same instant would leave the modification time as it is."""
    monkeypatch.setattr(listing, "SETTLED", 2 * 10**9)
    spec = make(tmp_path / "data")
    num_listed = 0

    def counted(kind: type) -> None:
        plain = kind.listing

        def listing_of(*arguments: object) -> object:
            nonlocal num_listed
            num_listed += 1
            return plain(*arguments)

        monkeypatch.setattr(kind, "listing", listing_of)

    counted(FolderReader)
    counted(CocoReader)
    for expected in (1, 2):
        content(spec, "all")
        assert num_listed == expected
    for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        os.utime(path, (10**9, 10**9))
    content(spec, "all")
    content(spec, "all")
    assert num_listed == 3


@MAKERS
@pytest.mark.parametrize("name", ["records.arrow", "watched.arrow", "flags.npy", "about.txt"])
def test_a_damaged_index_is_made_again(tmp_path: Path, make: Maker, name: str) -> None:
    spec = make(tmp_path / "data")
    before = content(spec, "train")
    (file,) = (tmp_path / "cache").rglob(name)
    file.write_bytes(file.read_bytes()[:10])
    assert content(spec, "train") == before
