"""Files: written completely or not at all, even if power is lost; tensors in safetensors; the user's cache.

The only module that writes under temporary names and reads safetensors. A temporary file lies beside the final one,
and its name begins with TEMPORARY; such files of a killed process may be deleted.
"""

from __future__ import annotations  # torch and numpy are imported where they are used: the command line imports this

import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crossflow.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from safetensors import safe_open
    from torch import Tensor

TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT}


class DamagedFile(UserError):
    """A file whose content is cut off, altered, or of another format."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as temporary:` write `temporary`; it becomes `path` at the end, or is removed on an error.

    A missing folder is created. The file reaches the disk before it is renamed, and its mode follows the umask
    even where a library writes private files. After a crash the final name holds the old file, or none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(b"")
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """As `replacing`, for a folder: `folder` must be empty or missing, and appears with all its files at once.

    The remains of a killed attempt are removed first, so only one process may create a folder at a time.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{TEMPORARY}{folder.name[:40]}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        settle(temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)


def settle(folder: Path) -> None:
    """Syncs the files that a library wrote below `folder` to the disk, and gives them the mode of the umask."""
    sample = _temporary(folder / "sample")
    sample.write_bytes(b"")
    mode = stat.S_IMODE(sample.stat().st_mode)
    sample.unlink()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
            _sync(path)
        else:
            sync_folder(path)
    sync_folder(folder)


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Writes a file (text in UTF-8) by `replacing`; returns its path. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def write_json(path: Path, content: Mapping[str, object]) -> Path:
    """Writes `content` as indented JSON with sorted keys by `replacing`; returns its path."""
    return write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True))


def write_array(path: Path, array: np.ndarray) -> Path:
    """Writes an array as .npy by `replacing`; returns its path."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return write_atomically(path, content.getvalue())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | np.ndarray], metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes tensors (of any device) and arrays as safetensors by `replacing`; returns the path.

    Raises OSError or SafetensorError, see `is_full`.
    """
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(_independent(tensors), temporary, metadata=None if metadata is None else dict(metadata))
    return path


def encode_tensors(tensors: Mapping[str, Tensor | np.ndarray]) -> bytes:
    """The content of the safetensors file of these tensors; the same tensors give the same bytes."""
    from safetensors.torch import save

    encoded: bytes = save(_independent(tensors))
    return encoded


def _independent(tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    """Contiguous tensors without shared memory, which the format does not support: tied weights become copies."""
    import numpy as np
    import torch

    storages: set[int] = set()
    independent = {}
    for name, value in tensors.items():
        tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value.detach()
        storage = tensor.untyped_storage().data_ptr()
        independent[name] = tensor.contiguous().clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return independent


def read_tensors(path: Path, advice: str = "Create it again, or use another copy.") -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    advice: the last sentence of the messages. Raises DamagedFile, or UserError when the file does not exist.
    """
    from safetensors.torch import load_file

    with _reading(path, advice):
        return load_file(path)


def open_tensors(path: Path, advice: str = "Create it again, or use another copy.") -> safe_open:
    """An open safetensors file, whose tensors are read whole or by rows (`get_tensor`, `get_slice`) while it is held.

    Raises as `read_tensors`.
    """
    from safetensors import safe_open

    with _reading(path, advice):
        return safe_open(path, framework="pt")


def read_metadata(path: Path, advice: str = "Create it again, or use another copy.") -> dict[str, str]:
    """The texts stored in the header of a safetensors file. Raises as `read_tensors`."""
    from safetensors import safe_open

    with _reading(path, advice), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def tensor_shapes(path: Path, advice: str = "Create it again, or use another copy.") -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file, from its header alone. Raises as `read_tensors`."""
    from safetensors import safe_open

    with _reading(path, advice), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping


@contextmanager
def _reading(path: Path, advice: str) -> Iterator[None]:
    """Turns the errors of reading a safetensors file into UserErrors of one paragraph."""
    from safetensors import SafetensorError

    if not path.is_file():
        raise UserError(f"The file {path} does not exist. {advice}")
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedFile(f"{path} is damaged and cannot be read ({reason}). {advice}") from error


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy where the file system has no links; atomically."""
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder, which disappears at once; a crash meanwhile leaves a temporary one. It may be missing."""
    if folder.is_dir():
        doomed = folder.with_name(f"{TEMPORARY}old-{folder.name[:40]}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def is_temporary(path: Path) -> bool:
    """Whether the file or folder is the remains of an interrupted write, or in the course of being written."""
    return path.name.startswith(TEMPORARY)


def remove_temporaries(folder: Path) -> None:
    """Removes the temporary files of interrupted writes in `folder`; no other process may be writing there."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses, short enough for any file system."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name[:40]}")


def _sync(path: Path) -> None:
    """Flushes the content of a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable (folders cannot be opened on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full(error: BaseException) -> bool:
    """Whether the error means that the disk (or the quota) is full; safetensors raises its own error class."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    from safetensors import SafetensorError

    return isinstance(error, SafetensorError) and any(f"os error {number}" in str(error) for number in _FULL)


def size_in_words(num_bytes: float) -> str:
    """`1.5 GB`, in powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def user_cache() -> Path:
    """The folder for results that can be recomputed: ``$XDG_CACHE_HOME/crossflow`` or ``~/.cache/crossflow``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossflow"
