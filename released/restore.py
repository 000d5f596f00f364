"""Our folders -> released files, tensor by tensor: what `crossflow convert DIR FILE` does."""

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
    Progress,
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
    """Writes the weights of a run directory or codec's folder under the original keys: .safetensors, or torch's format.

    kind: only for a run that was not converted but trained here on a network of that kind; then the generator's keys
    alone are written. The inverse of `from_file`, bit for bit, but for what was dropped then.
    Raises UserError for folders that hold no such network, files that are there already, full disks.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"The name of a file of weights ends in {', '.join(SUFFIXES)}; {path.name} does not.")
    if path.exists():
        raise UserError(f"{path} is there already. Remove it, or give another name.")
    origin = _origin(folder, kind)
    tensors = _of_folder(folder, origin["kind"])
    rules = kind_named(origin["kind"])
    strange = [name for name in tensors if not any(re.fullmatch(rule.pattern, name) for rule in rules.rules)]
    if strange:
        raise UserError(
            f"The network in {folder} is not of the kind {origin['kind']!r}: it has {len(strange)} tensors that one "
            f"does not have, such as {strange[0]}."
        )
    absent = set(origin.get("absent", ()))
    pieces = [
        piece for entry in entries(tensors, rules.rules) for piece in _original(entry, tensors[entry.name], absent)
    ]
    check_disk(path, size_of(pieces))
    write = write_safetensors if path.suffix == ".safetensors" else write_torch
    write(path, pieces, counter(progress, pieces))
    return Converted(path, origin.get("name", folder.name), origin["kind"], len(pieces), origin.get("dropped", {}))


def _origin(folder: Path, kind: str | None) -> dict[str, Any]:
    path = folder / ORIGIN_FILE
    if not path.is_file():
        if kind is None:
            raise UserError(
                f"{folder} was not converted from a released file: it has no {ORIGIN_FILE}. If its network is one of "
                "the released kinds, say which with --kind."
            )
        return {"kind": kind}
    try:
        origin: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = str(origin["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged and does not say any more what the folder was converted from. Convert the original "
            "file again; or remove this one, and say with --kind which of the released kinds the network is."
        ) from error
    if kind not in (None, found):
        raise UserError(f"{folder} holds {origin.get('name', 'a network')}, of the kind {found!r}, not {kind!r}.")
    return origin


def _of_folder(folder: Path, kind: str) -> dict[str, "_Stored"]:
    """{our name: where its tensor lies} of everything the folder holds of a network."""
    if kind in CODEC_WEIGHTS:
        return _stored(folder / WEIGHTS_FOLDER / CODEC_WEIGHTS[kind], CODEC_PREFIX)
    weights = next((folder / name for name in WEIGHTS.values() if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"{folder} holds no weights: there is no {' or '.join(WEIGHTS.values())} in it.")
    heads = folder / OBJECTIVE_FILE
    return _stored(weights, "") | (_stored(heads, released.HEADS) if heads.is_file() else {})


@dataclass(frozen=True)
class _Stored:
    weights: Weights
    key: str


def _stored(path: Path, prefix: str) -> dict[str, _Stored]:
    weights = read_weights(path)
    return {prefix + key: _Stored(weights, key) for key in weights}


def _original(entry: Entry, stored: _Stored, absent: set[str]) -> Iterator[Piece]:
    """The reference's tensors that one of ours is made of."""
    for key, empty in entry.split(stored.weights.empty[stored.key]).items():
        if key not in absent:
            yield Piece(key, empty, functools.partial(_part, entry, stored, key))


def _part(entry: Entry, stored: _Stored, key: str) -> Tensor:
    return entry.split(stored.weights[stored.key])[key]
