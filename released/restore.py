"""Run directories and codec folders -> released files, tensor by tensor: `crossflow convert DIR FILE`."""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crossflow import released
from crossflow.core.errors import UserError
from crossflow.core.progress import Progress
from crossflow.engine.folder import WEIGHTS
from crossflow.networks.codecs.base import WEIGHTS_FOLDER
from crossflow.released.files import (
    SUFFIXES,
    Piece,
    Weights,
    read_weights,
    size_of,
    write_safetensors,
    write_torch,
)
from crossflow.released.folders import (
    CODEC_PREFIX,
    CODEC_WEIGHTS,
    OBJECTIVE_FILE,
    ORIGIN_FILE,
    Converted,
    check_disk,
    counter,
)
from crossflow.released.kinds import kind_named
from crossflow.released.rules import Entry, entries


def to_file(
    folder: str | Path,
    path: str | Path,
    *,
    kind: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Writes the weights of a run directory or codec folder under the original keys, bit for bit, as the inverse of
    `from_file`: the keys that `from_file` dropped are lost.

    path: .safetensors, or a suffix of torch's format. kind: only for a run that was trained with a network of that kind
    instead of converted; its file has the generator's keys alone. progress: called with bytes written and total.
    Raises UserError for a folder without such a network, an existing file, and a full disk.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"The name of a file of weights must end in {', '.join(SUFFIXES)}, got {path.name}.")
    if path.exists():
        raise UserError(f"{path} already exists. Remove it, or give another name.")
    origin = _origin(folder, kind)
    tensors = _of_folder(folder, origin["kind"])
    rules = kind_named(origin["kind"])
    unknown = [name for name in tensors if not any(re.fullmatch(rule.pattern, name) for rule in rules.rules)]
    if unknown:
        raise UserError(
            f"The network in {folder} is not of the kind {origin['kind']!r}: {len(unknown)} of its tensors are unknown "
            f"there, such as {unknown[0]}. Give another --kind."
        )
    absent = set(origin.get("absent", ()))
    pieces = [piece for entry in entries(tensors, rules.rules) for piece in _pieces(entry, tensors[entry.name], absent)]
    check_disk(path, size_of(pieces))
    write = write_safetensors if path.suffix == ".safetensors" else write_torch
    write(path, pieces, counter(progress, pieces))
    return Converted(path, origin.get("name", folder.name), origin["kind"], len(pieces), origin.get("dropped", {}))


def _origin(folder: Path, kind: str | None) -> dict[str, Any]:
    """The content of released.json, or only the kind for a folder without it."""
    path = folder / ORIGIN_FILE
    if not path.is_file():
        if kind is None:
            raise UserError(
                f"{folder} was not converted from a released file: it has no {ORIGIN_FILE}. If its network is one of "
                "the released kinds, name it with --kind."
            )
        return {"kind": kind}
    try:
        origin: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recorded = str(origin["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, so the origin of the folder is unknown. Convert the original file again; or remove "
            f"{ORIGIN_FILE}, and name the kind of the network with --kind."
        ) from error
    if kind not in (None, recorded):
        raise UserError(
            f"{folder} holds {origin.get('name', 'a network')}, of the kind {recorded!r}, not {kind!r}. Leave "
            "out --kind."
        )
    return origin


def _of_folder(folder: Path, kind: str) -> dict[str, "_Stored"]:
    """{tensor name: its place in a file} of a network's tensors in `folder`."""
    if kind in CODEC_WEIGHTS:
        return _stored(folder / WEIGHTS_FOLDER / CODEC_WEIGHTS[kind], CODEC_PREFIX)
    weights = next((folder / name for name in WEIGHTS.values() if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"{folder} holds no weights: it has neither {' nor '.join(WEIGHTS.values())}.")
    heads = folder / OBJECTIVE_FILE
    return _stored(weights, "") | (_stored(heads, released.HEADS) if heads.is_file() else {})


@dataclass(frozen=True)
class _Stored:
    weights: Weights
    key: str


def _stored(path: Path, prefix: str) -> dict[str, _Stored]:
    weights = read_weights(path)
    return {prefix + key: _Stored(weights, key) for key in weights}


def _pieces(entry: Entry, stored: _Stored, absent: set[str]) -> Iterator[Piece]:
    """The reference's tensors that hold one tensor of the network."""
    for key, empty in entry.split(stored.weights.empty[stored.key]).items():
        if key not in absent:
            yield Piece(key, empty, functools.partial(_part, entry, stored, key))


def _part(entry: Entry, stored: _Stored, key: str) -> Tensor:
    return entry.split(stored.weights[stored.key])[key]
