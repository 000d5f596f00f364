"""What an evaluation has finished, kept on disk batch by batch, so that a killed one goes on where it was.

One file for each batch, written whole or not at all: rows, features and the first pictures. A folder belongs to one
evaluation; what another one left there is removed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.core.files import DamagedFile, read_metadata, read_tensors, write_atomically, write_tensors
from crossflow.tasks.scoring import Tile


@dataclass
class Part:
    """A finished batch: numbers of its cases (also of those that cannot be scored), rows by number, pictures.

    trivial: rows of the trivial output; arrays: per scored case, in the order of `rows`, such as features (N, D).
    """

    numbers: list[int]
    rows: dict[int, dict[str, Any]]
    bad: dict[str, str] = field(default_factory=dict)
    trivial: dict[int, dict[str, Any]] = field(default_factory=dict)
    pages: dict[int, list[Tile]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Ledger:
    """The finished batches of one evaluation, in a folder. `identity`: everything that its numbers depend on."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder.is_dir() and not self.holds(folder, identity):
            self.remove()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "identity", _key(identity))

    @staticmethod
    def holds(folder: Path, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds finished batches of the evaluation with this identity."""
        file = folder / "identity"
        return file.is_file() and file.read_text() == _key(identity)

    def add(self, part: Part) -> None:
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
        """The finished batches in order; a file that cannot be read counts as not finished."""
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
        shutil.rmtree(self.folder, ignore_errors=True)


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
