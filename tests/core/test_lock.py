"""A folder has one writer, whom a message names; a dead one keeps nobody out."""

import errno
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossflow.core.errors import UserError
from crossflow.core.lock import LOCK, FolderLock


def test_a_second_writer_is_told_about_the_first(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"), pytest.raises(UserError) as caught:
        FolderLock(tmp_path / "run").acquire()
    assert re.search(rf"in use by process {os.getpid()} on \S+ since \d{{4}}-.* UTC", str(caught.value))
    assert list((tmp_path / "run").iterdir()) == []
    with FolderLock(tmp_path / "run"):
        pass


def test_a_message_needs_no_readable_holder(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        (tmp_path / LOCK).write_text('{"pid": ')
        with pytest.raises(UserError, match="in use by another process"):
            FolderLock(tmp_path).acquire()


@pytest.fixture
def dead_holder(tmp_path: Path) -> Iterator[int]:
    """A process that was killed while it held the lock; its number. A child of it still runs."""
    ready, child = tmp_path / "ready", os.fork()
    if child == 0:
        lock = FolderLock(tmp_path / "run")
        lock.acquire()
        if os.fork() != 0:
            (tmp_path / "half").write_text(str(os.getpid()))
            os.replace(tmp_path / "half", ready)
        time.sleep(60)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.001)
    with pytest.raises(UserError, match=f"process {child} "):
        FolderLock(tmp_path / "run").acquire()
    orphans = [int(pid) for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    yield child
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)


def test_a_killed_holder_releases_the_lock_even_if_its_children_live(dead_holder: int, tmp_path: Path) -> None:
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == dead_holder
    with FolderLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_whose_file_was_removed_does_not_count(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    first.acquire()
    (tmp_path / LOCK).unlink()
    with FolderLock(tmp_path):
        first.release()
        assert (tmp_path / LOCK).exists(), "the file of the second holder was removed by the first"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be written \({os.strerror(number)}\).*--output"):
        FolderLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_reported_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with FolderLock(tmp_path):
        assert "no locks" in caplog.text
