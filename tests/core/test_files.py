"""Files: whole or not at all, durable, and what is said of their sizes."""

import errno
import os
from pathlib import Path

import pytest

from crossflow.core.files import is_full, size_in_words, user_cache, write_atomically


def test_a_file_is_replaced_whole_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space") as caught:
            write_atomically(path, b"other")
    assert is_full(caught.value)
    assert path.read_bytes() == "größer\n".encode()
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be opened")
def test_the_name_of_a_file_is_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    write_atomically(tmp_path / "a", b"content")
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_a_name_as_long_as_can_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("🎉" * 62 + ".txt")  # 252 of the 255 bytes a name may have
    write_atomically(path, "content")
    assert path.read_text() == "content"


def test_is_full_tells_a_full_disk_from_other_troubles() -> None:
    from safetensors import SafetensorError

    assert is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_full(SafetensorError("I/O error: No space left on device (os error 28)"))
    assert not is_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_full(ValueError("os error 28"))


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")]
)
def test_size_in_words(number: float, words: str) -> None:
    assert size_in_words(number) == words


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "crossflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "crossflow"
