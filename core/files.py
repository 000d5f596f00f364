"""Files that are there whole or not at all, also after a loss of power; the user's cache; sizes in words."""

import errno
import os
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file (texts in UTF-8) under a temporary name beside it, flushes it to the disk and renames it.

    Raises OSError, and then leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name[:40]}.part{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Brings what was written to a file to the disk."""
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
    """Whether the error says that the disk (or the quota) is full; safetensors tells it in an error of its own."""
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
    """Where what can be made again is kept between runs: ``$XDG_CACHE_HOME/crossflow`` or ``~/.cache/crossflow``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossflow"
