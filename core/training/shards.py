"""The tensors of checkpoints, read in parts, and checkpoints that every process writes its part of.

A part of a checkpoint (model, ema, objective, optimizer) is a file `model.safetensors`; or its tensors lie in the
`shard-*.safetensors` of all processes, as `model/NAME`, each with the first row in the file's metadata: the safetensors
form of torch.distributed.checkpoint. Either is read by any number of processes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from crossflow.core.files import open_tensors, write_tensors
from crossflow.core.training.sharding import like, own_rows

PARTS = ("model", "ema", "objective", "optimizer")
_OFFSETS = "DCP_SHARDING_INFO"  # the key of the metadata under which torch stores the offsets
_ADVICE = "Resume from another checkpoint."


@dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor in an open file."""

    file: Any
    key: str
    start: int
    shape: tuple[int, ...]


class Stored:
    """The tensors of one part of a checkpoint, in one file or in shards.

    stored = Stored(Path("runs/mine/checkpoints/step_00001000"), "ema")
    stored.shape("backbone.embed.weight")
    stored.read("backbone.embed.weight", slice(0, 8))
    """

    def __init__(self, checkpoint: Path, part: str) -> None:
        shards, prefix = sorted(checkpoint.glob("shard-*.safetensors")), f"{part}/"
        if not shards:
            whole = checkpoint / f"{part}.safetensors"
            shards, prefix = [whole] if whole.is_file() else [], ""
        self._pieces: dict[str, list[_Piece]] = {}
        for path in shards:
            file = open_tensors(path, _ADVICE)
            offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key.startswith(prefix):
                    first = (*offsets.get(key, {}).get("saved_offsets", ()), 0)[0]
                    piece = _Piece(file, key, first, tuple(file.get_slice(key).get_shape()))
                    self._pieces.setdefault(key.removeprefix(prefix), []).append(piece)

    @property
    def names(self) -> Iterable[str]:
        """The names of the tensors."""
        return self._pieces.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, all its rows counted."""
        pieces = self._pieces[name]
        shape = pieces[0].shape
        return (max(piece.start + piece.shape[0] for piece in pieces), *shape[1:]) if shape else ()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The given rows (start, stop) of a tensor, by default all of it, on the CPU."""
        shape = self.shape(name)
        if not shape:
            piece = self._pieces[name][0]
            return cast(Tensor, piece.file.get_tensor(piece.key))
        rows = rows or slice(0, shape[0])
        parts: list[Tensor] = []
        for piece in sorted(self._pieces[name], key=lambda piece: piece.start):
            start = max(0, rows.start - piece.start)
            stop = min(piece.shape[0], rows.stop - piece.start)
            if start < stop or not parts:
                parts.append(piece.file.get_slice(piece.key)[start : max(start, stop)])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def tensors(self, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors, each divided among the processes as the `present` one of its name and shape, if there is one."""
        tensors = {}
        for name in self.names:
            target, shape = present.get(name), self.shape(name)
            if target is None or not shape or tuple(target.shape) != shape:
                tensors[name] = self.read(name)
            else:
                tensors[name] = like(target, self.read(name, own_rows(target)).to(target.device))
        return tensors


def consolidate(checkpoint: Path, names: Iterable[str], folder: Path) -> list[Path]:
    """Writes the parts `names` of a checkpoint to `folder`, each as one file of whole tensors; returns the files.

    A part without tensors is left out.
    """
    files = []
    for name in names:
        stored = Stored(checkpoint, name)
        tensors = {key: stored.read(key) for key in stored.names}
        if tensors:
            files.append(write_tensors(folder / f"{name}.safetensors", tensors))
    return files
