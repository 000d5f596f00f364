"""Released files -> run directories and codec folders, tensor by tensor: `crossflow convert FILE DIR`.

A flow model becomes a run directory, a codec becomes a codec folder. Beside the weights, released.json records the
origin, from which restore.py writes the original keys again.
"""

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from crossflow import released
from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically, write_json
from crossflow.core.model import CrossFlow
from crossflow.core.progress import Progress
from crossflow.core.settings import build, dump, merge, parse_overrides
from crossflow.core.weights import shapes_only
from crossflow.data.image_latents import FOLDER as CODEC_FOLDER
from crossflow.engine.folder import WEIGHTS
from crossflow.engine.provenance import environment
from crossflow.networks.codecs.autoencoders import AutoencoderKLCodec
from crossflow.networks.codecs.base import SETTINGS_FILE, WEIGHTS_FOLDER
from crossflow.networks.codecs.flowtitok import FlowTiTokCodec
from crossflow.networks.codecs.network import NetworkCodec
from crossflow.networks.frozen import checksum_of, digest
from crossflow.released.files import Piece, Weights, read_weights, size_of, write_safetensors
from crossflow.released.folders import (
    CODEC_PREFIX,
    CODEC_WEIGHTS,
    OBJECTIVE_FILE,
    ORIGIN_FILE,
    Converted,
    check_free,
    counter,
    new_folder,
)
from crossflow.released.kinds import Kind, kind_named
from crossflow.released.known import Known, identify, read_config
from crossflow.released.rules import Entry, check, entries, expected_shapes
from crossflow.tasks import task_class
from crossflow.tasks.t2i.config import T2IConfig
from crossflow.tasks.t2i.encoder import FROZEN_FILE


def from_file(
    source: str | Path,
    folder: str | Path,
    *,
    kind: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Converts a released file into a run directory or a codec folder, which appears complete or not at all.

    kind, config: of a network that is not one of the released files; config is a JSON or YAML file of the reference's
    own settings. overrides: key=value settings of a flow model's run, such as text.encoder and codec.source.
    progress: called with bytes written and total. Tensors are read one by one; the memory in use never exceeds the size
    of the file.
    Raises UserError for a wrong kind, missing, mismatched or unknown tensors, an unreadable file, a folder that is not
    empty, a full disk, and overrides that would change the network.

        converted = from_file("t2i_256px_clip_dimr.pth", "runs/clip")
        pipe = crossflow.load(converted.path)
    """
    folder = Path(folder)
    check_free(folder)
    weights = read_weights(source)
    config_kind, settings = read_config(Path(config)) if config is not None else (None, None)
    known = identify(weights.empty, kind or config_kind, settings, weights.path)
    rules = kind_named(known.kind)
    module = released.empty(known.kind, known.config, list(weights))
    own = released.tensors(module)
    table = entries(own, rules.rules)
    shapes = expected_shapes(own, table)
    _check_kind(weights, shapes, known, rules)
    unused = check(weights.empty, shapes, rules.dropped, known.kind)
    pieces = [piece for entry in table for piece in _piece(entry, weights, own[entry.name])]
    dropped = _by_reason(unused, rules)
    origin = {
        "kind": known.kind,
        "name": known.name,
        "file": weights.path.name,
        "config": known.config,
        "absent": [key for key in shapes if key not in weights],
        "dropped": dropped,
    }
    if isinstance(module, CrossFlow):
        run = _run_config(known, list(weights), overrides, module)
        notes = _notes(run)
        with new_folder(folder, size_of(pieces)) as part:
            _write_run(part, run, pieces, counter(progress, pieces))
            _write_origin(part, origin, run)
    else:
        if overrides:
            raise UserError(
                f"{known.name} is a codec and has no settings to override: leave out {' '.join(overrides)}."
            )
        notes = [f"To use it in a run: codec.source={folder}"]
        with new_folder(folder, size_of(pieces)) as part:
            _write_codec(part, module, pieces, counter(progress, pieces))
            _write_origin(part, origin, None)
    return Converted(folder, known.name, known.kind, len(weights) - len(unused), dropped, notes)


def _check_kind(weights: Weights, shapes: Mapping[str, Any], known: Known, kind: Kind) -> None:
    """Raises UserError for a file of another kind, instead of listing hundreds of mismatched tensors."""
    matching = sum(key in weights and weights.empty[key].shape == shape for key, (shape, _) in shapes.items())
    used = {key for key in weights if not any(re.fullmatch(pattern, key) for pattern in kind.dropped)}
    if matching < len(used | shapes.keys()) / 2:
        raise UserError(
            f"{weights.path} holds {matching} of the {len(shapes)} tensors of a {known.kind!r} network with these "
            f"settings, and {len(used) - matching} others: it is another network. Check --kind and --config."
        )


def _piece(entry: Entry, weights: Weights, initial: Tensor) -> Iterator[Piece]:
    """One tensor of the network: from the file, or its initial value where the file lacks an optional one."""
    if all(key in weights for key in entry.keys):
        empty = entry.join(weights.empty[key] for key in entry.keys)
        yield Piece(entry.name, empty, lambda: entry.join(weights[key] for key in entry.keys))
    elif not initial.is_meta:
        yield Piece(entry.name, initial.to("meta"), lambda: initial)


def _by_reason(unused: Sequence[str], kind: Kind) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for key in unused:
        reason = next(reason for pattern, reason in kind.dropped.items() if re.fullmatch(pattern, key))
        keys.setdefault(reason, []).append(key)
    return keys


def _run_config(known: Known, keys: Sequence[str], overrides: Sequence[str], module: CrossFlow) -> T2IConfig:
    """The configuration of the run. Raises UserError for overrides that would change the network."""
    settings = released.settings(known.kind, known.config, keys)
    if settings["codec"]["kind"] == AutoencoderKLCodec.kind:
        settings["codec"]["source"] = AutoencoderKLCodec.example
    settings = merge(settings, parse_overrides(overrides))
    for section, name in (("text", "encoder"), ("codec", "source")):
        settings[section] = {**settings[section], name: _local(f"{section}.{name}", settings[section].get(name))}
    config = build(T2IConfig, settings)
    task = task_class("t2i").outline(config)
    with shapes_only():
        built = task.build_model().state_dict()
    converted = module.state_dict()
    different = [key for key in {**built, **converted} if key not in built or key not in converted]
    different += [key for key in built if key in converted and built[key].shape != converted[key].shape]
    if different:
        raise UserError(
            f"With {' '.join(overrides)} the network would have other tensors than {known.name}: "
            f"{', '.join(different[:3])}{' and more' if len(different) > 3 else ''}. Only settings outside the network "
            "can be overridden, such as text.encoder, codec.source and sample.*."
        )
    return config


def _local(name: str, value: str | None) -> str | None:
    """The absolute path of a folder, since a run is also used from other folders; a hub id unchanged."""
    if value is None:
        return None
    folder = Path(value).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if value.startswith((".", "/", "~")):
        raise UserError(f"{name} = {value}: this folder does not exist. Give a folder, or a hub id such as owner/name.")
    return value


def _notes(config: T2IConfig) -> list[str]:
    """What the user still has to set, or may replace: the networks beside the converted one."""
    text, codec = config.text, config.codec
    notes = []
    for name, value, example in (
        ("text.encoder", text.encoder, "the text encoder's hub id or folder"),
        ("codec.source", codec.source, "the folder that the tokenizer was converted to"),
    ):
        if value is None:
            notes.append(f"Not set: {name}. Give {name}=..., {example}; or --set {name}=... when sampling.")
        else:
            notes.append(f"{name}: {value}. To use another place: --set {name}=FOLDER when sampling.")
    return notes


def _write_run(folder: Path, config: T2IConfig, pieces: Sequence[Piece], on_bytes: Callable[[int], None]) -> None:
    heads = [
        piece._replace(name=piece.name.removeprefix(released.HEADS))
        for piece in pieces
        if piece.name.startswith(released.HEADS)
    ]
    write_safetensors(
        folder / WEIGHTS["model"], [piece for piece in pieces if not piece.name.startswith(released.HEADS)], on_bytes
    )
    write_safetensors(folder / OBJECTIVE_FILE, heads, on_bytes)
    write_json(folder / FROZEN_FILE, {**config.text.loading(), "checksum": None})
    codec = config.codec
    (folder / CODEC_FOLDER).mkdir()
    settings = {
        "kind": codec.kind,
        "options": {"source": codec.source or "", "subfolder": codec.subfolder},
        "scale": [codec.scale if codec.scale is not None else 1.0],
        "shift": [codec.shift if codec.shift is not None else 0.0],
        "embedded": False,
    }
    write_json(folder / CODEC_FOLDER / SETTINGS_FILE, settings)
    write_atomically(folder / "config.yaml", dump(config))


def _write_codec(folder: Path, codec: nn.Module, pieces: Sequence[Piece], on_bytes: Callable[[int], None]) -> None:
    assert isinstance(codec, NetworkCodec)
    (folder / WEIGHTS_FOLDER).mkdir()
    if isinstance(codec, FlowTiTokCodec):  # trained on pictures in [0, 1], which its settings do not record
        codec.network.config = replace(codec.network.config, pixels="unit")
    codec.network.save_config(folder / WEIGHTS_FOLDER)
    digests: list[bytes] = []

    def digested(piece: Piece) -> Tensor:
        tensor = piece.make()
        if tensor.is_floating_point():
            digests.append(digest(tensor.float()))  # a codec is loaded in float32
        return tensor

    own = [
        Piece(piece.name.removeprefix(CODEC_PREFIX), piece.empty, functools.partial(digested, piece))
        for piece in pieces
    ]
    write_safetensors(folder / WEIGHTS_FOLDER / CODEC_WEIGHTS[codec.kind], own, on_bytes)
    codec.checksum = checksum_of(digests)
    write_json(folder / SETTINGS_FILE, codec.record(embed=True))


def _write_origin(folder: Path, origin: Mapping[str, Any], config: Config | None) -> None:
    write_json(folder / ORIGIN_FILE, dict(origin))
    manifest = {
        "task": config.task if config is not None else None,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "converted_from": {name: origin[name] for name in ("name", "kind", "file")},
        **environment(),
    }
    write_json(folder / "manifest.json", manifest)
