"""The finished batches of an evaluation on disk, so that a killed one continues where it was.

One file for each batch: rows, features and the pictures of the page. A folder belongs to one evaluation; batches of
another one are removed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.core.files import (
    DamagedFile,
    read_metadata,
    read_tensors,
    remove_folder,
    replacing_folder,
    write_atomically,
    write_tensors,
)
from crossflow.data.cases import Tile

Row = dict[str, Any]
"""The numbers of one item and its id."""


@dataclass
class Part:
    """A finished batch.

    numbers: those of all its cases, with or without a row; rows: by number; bad: item id -> why it has no row; trivial:
    rows of the trivial output; pages: the tiles of shown items; arrays: one row per scored case, in the order of
    `rows`, such as features (N, D).
    """

    numbers: list[int]
    rows: dict[int, Row]
    bad: dict[str, str] = field(default_factory=dict)
    trivial: dict[int, Row] = field(default_factory=dict)
    pages: dict[int, list[Tile]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Ledger:
    """The finished batches of one evaluation in a folder; `identity` is everything that its numbers depend on."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder.is_dir() and not self.holds(folder, identity):
            self.remove()
        if not folder.is_dir():
            with replacing_folder(folder) as temporary:
                write_atomically(temporary / "identity", _key(identity))

    @staticmethod
    def holds(folder: Path, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds finished batches of the evaluation with this identity."""
        file = folder / "identity"
        return file.is_file() and file.read_text() == _key(identity)

    def add(self, part: Part) -> None:
        """Writes a finished batch, completely or not at all."""
        tiles = {
            f"tile/{number}/{place}": np.ascontiguousarray(tile.image)
            for number, page in part.pages.items()
            for place, tile in enumerate(page)
        }
        about = {
            "rows": list(part.rows.items()),
            "bad": part.bad,
            "trivial": list(part.trivial.items()),
            "texts": [[number, [tile.text for tile in page]] for number, page in part.pages.items()],
        }
        arrays = {f"array/{name}": np.ascontiguousarray(value) for name, value in part.arrays.items()}
        path = self.folder / f"{part.numbers[0]:08d}-{part.numbers[-1]:08d}.safetensors"
        tensors = {"numbers": np.asarray(part.numbers, dtype=np.int64), **arrays, **tiles}
        write_tensors(path, tensors, {"part": json.dumps(about, ensure_ascii=False)})

    def parts(self) -> Iterator[Part]:
        """The finished batches in order; a damaged file counts as unfinished and is removed."""
        for path in sorted(self.folder.glob("*.safetensors")):
            part = _read(path)
            if part is None:
                path.unlink()
            else:
                yield part

    def finished(self) -> set[int]:
        """The numbers of all finished cases."""
        return {number for part in self.parts() for number in part.numbers}

    def remove(self) -> None:
        """Removes the folder; a crash meanwhile leaves no partial ledger under its name."""
        remove_folder(self.folder)


def _key(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> Part | None:
    try:
        about = json.loads(read_metadata(path)["part"])
        tensors = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    except (DamagedFile, ValueError, KeyError):
        return None
    pages = {
        number: [Tile(tensors[f"tile/{number}/{place}"], text) for place, text in enumerate(texts)]
        for number, texts in about["texts"]
    }
    arrays = {name.removeprefix("array/"): value for name, value in tensors.items() if name.startswith("array/")}
    return Part(
        tensors["numbers"].tolist(), dict(map(tuple, about["rows"])), about["bad"],
        dict(map(tuple, about["trivial"])), pages, arrays,
    )  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """All finished batches of a ledger together, in the order of the cases."""

    rows: list[Row]
    trivial: list[Row]
    pages: list[list[Tile]]
    bad: dict[str, str]

    @classmethod
    def of(cls, ledger: Ledger) -> "Finished":
        """Everything but the arrays, which may be too large to be held at once."""
        rows: dict[int, Row] = {}
        trivial: dict[int, Row] = {}
        pages: dict[int, list[Tile]] = {}
        bad: dict[str, str] = {}
        for part in ledger.parts():
            rows |= part.rows
            trivial |= part.trivial
            pages |= part.pages
            bad |= part.bad
        return cls(
            [rows[number] for number in sorted(rows)],
            [trivial[number] for number in sorted(trivial)],
            [pages[number] for number in sorted(pages)],
            bad,
        )
