"""Codecs around a frozen network that comes from a hub id, a folder, or memory."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

from torch import nn

from crossflow.core.errors import UserError
from crossflow.core.files import settle
from crossflow.networks.codecs.base import SETTINGS_FILE, WEIGHTS_FOLDER, Codec, PerChannel, Record, read_record
from crossflow.networks.frozen import expect_checksum, freeze, weights_checksum

logger = logging.getLogger(__name__)


class NetworkCodec(Codec):
    """A codec with a frozen network: `build` loads it by hub id or folder, the constructor takes one from memory.

    The constructor of a subclass takes (network, scale, shift, chunk); scale and shift None mean the network's own.
    A saved codec records its network by source and SHA-256; the weights are copied into the folder on request, and
    always when they came from memory.
    """

    sources: ClassVar[str]
    """What `source` may be, in words, for the message when it is missing."""

    def __init__(
        self, network: nn.Module, channels: int, factor: int, scale: PerChannel, shift: PerChannel, chunk: int
    ) -> None:
        super().__init__(channels, factor, scale, shift, chunk)
        self.network = freeze(network).float()
        self.subfolder = ""
        self.eval()

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the weights."""
        return weights_checksum(self.network)

    @classmethod
    def build(
        cls,
        source: str = "",
        subfolder: str = "",
        checksum: str | None = None,
        scale: PerChannel | None = None,
        shift: PerChannel | None = None,
        chunk: int = 8,
    ) -> Self:
        """The codec around the network at `source`, a hub id or folder (`subfolder` of it), in float32.

        A folder may also be one that `save` wrote with its weights; its scale and shift then hold unless overridden.
        checksum: SHA-256 that the weights must have, None accepts any.
        Raises UserError when the network is unavailable or its weights differ.
        """
        if not source:
            raise UserError(f"The {cls.kind} codec needs a source (codec.source): {cls.sources}.")
        if Path(source).expanduser().is_dir():
            source = str(Path(source).expanduser().resolve())  # a run is also read from another working directory
            path = Path(source) / SETTINGS_FILE
            if path.is_file() and not subfolder:
                record = cls._embedded_record(path)
                subfolder = WEIGHTS_FOLDER
                scale = record["scale"] if scale is None else scale
                shift = record["shift"] if shift is None else shift
        construct: Callable[..., Self] = cls
        codec = construct(cls._load(source, subfolder), scale=scale, shift=shift, chunk=chunk)
        if checksum is not None:
            expect_checksum(source, codec.checksum, checksum)
        codec.source, codec.subfolder = source, subfolder
        logger.info("%s codec: %s, weights sha256 %s", cls.kind, source, codec.checksum)
        return codec

    def save(self, folder: str | Path, embed: bool = False) -> Path:
        """Writes codec.json to `folder`, and the weights too when `embed` is true or the network has no source."""
        embed = embed or self.source is None
        if embed:
            self.network.save_pretrained(Path(folder) / WEIGHTS_FOLDER)
            settle(Path(folder) / WEIGHTS_FOLDER)
        return super().save(folder, embed)

    def record(self, embed: bool = False) -> Record:
        """The content of codec.json, with the SHA-256 of the weights."""
        return super().record() | {"sha256": self.checksum, "embedded": embed}

    def options(self) -> dict[str, int | str]:
        """The arguments of `build`, other than checksum, scale and shift."""
        return {"source": self.source or "", "subfolder": self.subfolder, "chunk": self.chunk}

    @classmethod
    def _embedded_record(cls, path: Path) -> Record:
        """The record of a codec of this kind that was saved with its weights; raises UserError for any other."""
        record = read_record(path)
        if record["kind"] != cls.kind or not record.get("embedded"):
            contents = "with" if record.get("embedded") else "without"
            raise UserError(
                f"Expected a {cls.kind} codec with its weights in {path.parent}, got a {record['kind']} codec "
                f"{contents} its weights."
            )
        return record

    @classmethod
    def _load(cls, source: str, subfolder: str) -> nn.Module:
        raise NotImplementedError
