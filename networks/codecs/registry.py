"""The table of codecs: built by name from a recipe's options, and loaded from the folder that `Codec.save` wrote."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from crossflow.core.errors import UserError
from crossflow.core.registry import Registry
from crossflow.networks.codecs.autoencoders import AutoencoderKLCodec, AutoencoderTinyCodec
from crossflow.networks.codecs.base import SETTINGS_FILE, WEIGHTS_FOLDER, Codec, read_record
from crossflow.networks.codecs.flowtitok import FlowTiTokCodec
from crossflow.networks.codecs.network import NetworkCodec
from crossflow.networks.codecs.pixel import PixelCodec

CODECS: Registry[type[Codec]] = Registry("codec")
for _codec in (PixelCodec, AutoencoderKLCodec, AutoencoderTinyCodec, FlowTiTokCodec):
    CODECS.register(_codec.kind)(_codec)


def build_codec(kind: str, **options: object) -> Codec:
    """A codec by its name in `CODECS`. options: of `NetworkCodec.build`, or of the constructor without a network.

    Raises UserError for an unknown kind, and as `NetworkCodec.build` does.

    >>> build_codec("pixel", factor=4).latent_shape((64, 96))
    (48, 16, 24)
    """
    codec = CODECS.get(kind)
    create: Callable[..., Codec] = codec.build if issubclass(codec, NetworkCodec) else codec
    return create(**options)


def load_codec(folder: str | Path, *, source: str | None = None, subfolder: str = "") -> Codec:
    """The codec that `Codec.save` wrote to `folder`; a public network is loaded by its recorded source and checked.

    source, subfolder: of the network, if it has moved since; a relative path equal to the end of the recorded one has
    not moved. Raises UserError when the network is unavailable or its weights are not the recorded ones.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise UserError(f"{str(folder)!r} holds no codec: it has no {SETTINGS_FILE}.")
    record = read_record(path)
    options = dict(record["options"])
    checksum = record.get("sha256")
    if record.get("embedded"):
        options |= {"source": str(Path(folder) / WEIGHTS_FOLDER), "subfolder": ""}
    elif source is not None and "source" not in options:
        raise UserError(f"The {record['kind']} codec in {folder} has no network; leave out codec.source={source}.")
    elif source is not None and not _same_place(source, options["source"]):
        options |= {"source": source, "subfolder": subfolder}
    if checksum is not None:
        options["checksum"] = checksum
    codec = build_codec(record["kind"], **options)
    codec.set_scale(torch.tensor(record["scale"]), torch.tensor(record["shift"]))
    if record.get("embedded"):
        codec.source = None  # its weights are embedded again when it is saved elsewhere
    return codec


def _same_place(source: str, recorded: str) -> bool:
    return f"/{recorded}".endswith("/" + os.path.normpath(source).lstrip("./"))
