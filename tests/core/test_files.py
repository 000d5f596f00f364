"""Files: whole or not at all, durable, readable by colleagues; sizes in words."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from crossflow.core.errors import UserError
from crossflow.core.files import (
    DamagedFile,
    encode_tensors,
    is_full,
    read_metadata,
    read_tensors,
    remove_temporaries,
    replacing_folder,
    settle,
    size_in_words,
    tensor_shapes,
    user_cache,
    write_atomically,
    write_tensors,
)
from crossflow.core.training.checkpoint import write_checkpoint


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
def test_the_folder_entry_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    write_atomically(tmp_path / "a", b"content")
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """Weights, optimizer state and configurations of a shared run can be read by colleagues."""
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(2)})
        write_atomically(tmp_path / "config.yaml", "task: t2i\n")
        checkpoint = write_checkpoint(
            tmp_path, 1, {"model": {"w": torch.zeros(1)}, "optimizer": {"w": torch.zeros(1)}}, {}, keep=1
        )
        (tmp_path / "library").mkdir()
        save_file({"weight": torch.zeros(2)}, tmp_path / "library" / "weights.safetensors")
        settle(tmp_path / "library")
        with replacing_folder(tmp_path / "folder") as folder:
            save_file({"weight": torch.zeros(2)}, folder / "weights.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in checkpoint.iterdir()} >= {"model.safetensors", "optimizer.safetensors"}
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        path.name: oct(mode) for path in files
    }


@pytest.mark.parametrize("content", [b"old", None])
def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    child = os.fork()
    if child == 0:
        os.replace = lambda *names: os._exit(9)
        write_tensors(path, {"weight": torch.zeros(1000)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (path.read_bytes() if path.exists() else None) == content
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == ([path] if content is not None else [])


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:

    def stop_halfway() -> None:
        with replacing_folder(tmp_path / "run") as folder:
            write_atomically(folder / "a", "half")
            raise KeyError

    with pytest.raises(KeyError):
        stop_halfway()
    assert list(tmp_path.iterdir()) == []
    with replacing_folder(tmp_path / "run") as folder:
        write_atomically(folder / "deep" / "a", "whole")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "deep" / "a").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_tensors_arrays_and_texts_are_read_back(tmp_path: Path) -> None:
    weight, path = torch.arange(6.0).view(2, 3), tmp_path / "deep" / "a.safetensors"
    content = {"w": weight, "tied": weight, "turned": weight.T, "array": np.arange(4, dtype=np.int64)}
    assert write_tensors(path, content, {"about": "größer"}) == path
    read = read_tensors(path)
    assert all(torch.equal(read[name], torch.as_tensor(value)) for name, value in content.items())
    assert read_metadata(path) == {"about": "größer"}
    assert tensor_shapes(path) == {"w": (2, 3), "tied": (2, 3), "turned": (3, 2), "array": (4,)}
    write_tensors(path, content)
    assert path.read_bytes() == encode_tensors(content)


@pytest.mark.parametrize("read", [read_tensors, read_metadata, tensor_shapes])
@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_damaged_tensors_are_a_user_error_of_one_paragraph(tmp_path: Path, read: Callable, length: int) -> None:
    path = write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFile, match=r"a\.safetensors is damaged .*\. Take another\.$") as caught:
        read(path, "Take another.")
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.safetensors does not exist\. Take another\."):
        read(path, "Take another.")


def test_a_file_name_of_maximum_length_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("🎉" * 62 + ".txt")  # 252 of the 255 bytes a name may have
    write_atomically(path, "content")
    assert path.read_text() == "content"


def test_is_full_recognises_only_a_full_disk() -> None:
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


def test_user_cache_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "crossflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "crossflow"
