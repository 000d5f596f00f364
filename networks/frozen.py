"""Public networks used as they are: loaded by hub id or local folder, frozen, identified by a checksum.

A library fills missing weights with random ones and only logs it; here every missing weight is an error, and the
checksum shows whether two runs used the same network.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


class Frozen(nn.Module):
    """Base of modules around a `network` that is used as it is: it always stays in evaluation mode."""

    network: Any
    _visited: torch.device | None = None
    """Where the layers of an offloaded network compute."""

    @property
    def device(self) -> torch.device:
        """Where its inputs belong: the device of its weights, or the one that they visit, see `offload`."""
        device: torch.device = self._visited or next(self.network.parameters()).device
        return device

    def train(self, mode: bool = True) -> Self:
        """Keeps evaluation mode."""
        return super().train(False)

    def offload(self, device: torch.device) -> None:
        """Keeps the weights on the CPU; those of a layer are on `device` only while it computes there.

        Layer by layer, so that a text encoder larger than the device's memory can be used.
        """
        from accelerate import cpu_offload

        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.to(device))
        if isinstance(self.__dict__.get("_modules", {}).get("network"), nn.Module):
            cpu_offload(self.network, device)
            self._visited = device


def freeze(network: Network) -> Network:
    """`network` in evaluation mode, its parameters without gradients."""
    return network.eval().requires_grad_(False)


def weights_checksum(network: nn.Module) -> str:
    """SHA-256 (hexadecimal) over the floating-point weights of `network` in their present dtype.

    Names do not enter, since libraries rename modules between versions: the digests of the tensors (dtype, shape,
    bytes) are sorted and hashed together. Tensors shared under several names count once.
    """
    floating = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
    once = {tensor.data_ptr(): tensor for tensor in reversed(floating)}  # the first of several names
    return checksum_of(digest(tensor) for tensor in once.values())


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of one tensor: its dtype, shape and bytes."""
    sha256 = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.digest()


def checksum_of(digests: Iterable[bytes]) -> str:
    """The `weights_checksum` of a network whose floating-point tensors have these digests."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def expect_checksum(name: str, checksum: str, expected: str | None) -> None:
    """Raises UserError when the network called `name` is not the recorded one. expected: None accepts any."""
    if expected is not None and checksum != expected:
        raise UserError(
            f"The weights of {name!r} are not the ones this run was made with: expected SHA-256 {expected[:16]}…, got "
            f"{checksum[:16]}…. Point to the original weights, or train again with these."
        )


def load_frozen(load: Callable[..., Any], source: str, *, files: str, subfolder: str = "", **options: object) -> Any:
    """Loads a network by `load` (a `from_pretrained` of transformers or diffusers), checks it and freezes it.

    source: hub id or local folder; files: those that such a folder must hold, for the message; options: of `load`.
    Raises UserError when the network is unavailable or some of its weights are missing.
    """
    if subfolder:
        options["subfolder"] = subfolder
    network, report = load_public(load, source, files=files, output_loading_info=True, **options)
    missing = sorted(str(key) for key in report["missing_keys"])
    if missing:
        raise UserError(
            f"{source!r} lacks {len(missing)} weights of {type(network).__name__} ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}); the network would run on random ones. "
            "Give a complete copy of its weights."
        )
    return freeze(network)


def load_public(load: Callable[..., Any], source: str, *, files: str, **options: object) -> Any:
    """`load(source, **options)`. Raises UserError that says which files to put where when `source` is unavailable."""
    try:
        return load(source, **options)
    except Exception as error:  # tokenizers raises bare Exception, and connection errors differ between versions
        raise UserError(_not_available(source, files, error)) from error


def public_folder(source: str, files: Sequence[str]) -> Path:
    """The local folder of `source`, a folder or a hub id, from which only `files` are downloaded.

    Raises UserError when the hub repository is unavailable.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    def fetch(name: str) -> str:
        return snapshot_download(name, allow_patterns=list(files))

    return Path(load_public(fetch, source, files=" and ".join(files)))


def _not_available(source: str, files: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if Path(source).expanduser().is_dir():
        return f"The folder {source!r} could not be loaded: it must hold {files}. The loader reports: {reason}"
    if source.startswith((".", "/", "~")):
        return f"The folder {source!r} does not exist. Give a folder with {files}, or a hub id such as 'owner/name'."
    return (
        f"{source!r} is unavailable from the hub and from its local cache. Without a connection, put {files} of that "
        "repository into a folder and give the folder's path instead, or copy the hub cache of another machine and set "
        f"HF_HOME to it. The loader reports: {reason}"
    )
