"""Public networks used as they are: found by hub id or local folder, held still, known by a checksum of their weights.

A network whose weights were not all found runs without complaint on random ones; here every missing weight is an error,
and the checksum tells two runs whether they used the same network.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


def freeze(network: Network) -> Network:
    """The network in evaluation mode, its parameters without gradients."""
    return network.eval().requires_grad_(False)


def weights_checksum(network: nn.Module) -> str:
    """SHA-256 over the floating-point weights of `network`, exactly as they are held (so it depends on their dtype).

    Names do not enter, since libraries rename modules between versions: the digests of the tensors (dtype, shape,
    bytes) are sorted and hashed together. Tensors shared under several names count once.
    """
    floating = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
    once = {tensor.data_ptr(): tensor for tensor in reversed(floating)}  # of several names the first
    return checksum_of(digest(tensor) for tensor in once.values())


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of one tensor: its dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def checksum_of(digests: Iterable[bytes]) -> str:
    """The `weights_checksum` of a network whose floating-point tensors have these digests."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def expect_checksum(name: str, found: str, expected: str | None) -> None:
    """Raises UserError when the network called `name` is not the recorded one. `expected` None accepts any."""
    if expected is not None and found != expected:
        raise UserError(
            f"The weights of {name!r} are not the ones this run was made with: their SHA-256 is {found[:16]}…, "
            f"recorded is {expected[:16]}…. Point to the original weights, or train again with the new ones."
        )


def load_frozen(load: Callable[..., Any], source: str, *, files: str, subfolder: str = "", **options: Any) -> Any:
    """Loads a network by `load` (a `from_pretrained` of transformers or diffusers), checks it and freezes it.

    source: hub id or local folder; files: what such a folder must hold, for the message; options are passed on.
    Raises UserError when the network cannot be had, or when the files lack some of its weights.
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


def load_public(load: Callable[..., Any], source: str, *, files: str, **options: Any) -> Any:
    """`load(source, **options)`; whatever way it is not found becomes a UserError that says what to put where."""
    try:
        return load(source, **options)
    except (
        Exception
    ) as error:  # connection errors come as four unrelated classes, depending on the library and its version
        raise UserError(_not_available(source, files, error)) from error


def public_folder(source: str, files: Sequence[str]) -> Path:
    """The local folder of `source`, a folder or a hub id, of which `files` are fetched. Raises UserError."""
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
        return f"The folder {source!r} could not be loaded: it must hold {files}. The loader said: {reason}"
    if source.startswith((".", "/", "~")):
        return f"There is no folder {source!r}. Give a folder that holds {files}, or a hub id such as 'owner/name'."
    return (
        f"{source!r} could not be had from the hub or its local cache. Without a connection, put {files} of that "
        "repository into a folder and give the folder's path instead, or copy the hub cache of another machine and set "
        f"HF_HOME to it. The loader said: {reason}"
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` so that a reader finds either the old file or the whole new one."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True))
