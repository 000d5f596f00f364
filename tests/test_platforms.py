"""What can be checked of other systems: calls that only POSIX has are guarded, paths of Windows are understood.

`fork` and the like are absent on Windows as attributes, so each mention must lie below a test for it.
"""

import ast
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossflow.benchmarks.learning import entries
from crossflow.core.errors import UserError
from crossflow.core.training.signals import StopRequest
from crossflow.data.readers import open_reader
from crossflow.data.spec import split_forced, split_location
from crossflow.engine.health import machine

ROOT = Path(__file__).parent.parent
ROOMS = [path.parent for path in ROOT.glob("*/__init__.py")]
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
POSIX_ONLY = {
    "os": {
        *("fork", "forkpty", "getloadavg", "geteuid", "getgid", "getpgid", "getuid", "killpg", "mkfifo", "nice"),
        *("pread", "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sendfile", "setpgid"),
        *("setsid", "statvfs", "sysconf", "uname", "wait3", "wait4"),
    },
    "signal": {
        *(
            "ITIMER_REAL",
            "SIGALRM",
            "SIGBUS",
            "SIGCHLD",
            "SIGHUP",
            "SIGKILL",
            "SIGPIPE",
            "SIGQUIT",
            "SIGUSR1",
            "SIGUSR2",
        ),
        *("alarm", "getitimer", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"),
    },
}
ANY = re.compile("|".join(rf"\b{name}\b" for names in (POSIX_MODULES, *POSIX_ONLY.values()) for name in names))
GUARDS = ("hasattr(", "sys.platform", "os.name")
HANDLED = {"AttributeError", "ImportError", "ModuleNotFoundError"}


def posix_only(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that fail on Windows when they run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in POSIX_ONLY.get(node.value.id, ()):
                yield node
            continue
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        if (names | {node.module if isinstance(node, ast.ImportFrom) else None}) & POSIX_MODULES:
            yield node


def is_guarded(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a test of the system lies around the node, or an error of its absence is caught."""
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.If | ast.IfExp) and any(guard in ast.unparse(node.test) for guard in GUARDS):
            return True
        if isinstance(node, ast.Try):
            caught = {name.id for handler in node.handlers if handler.type for name in ast.walk(handler.type)
                      if isinstance(name, ast.Name)}  # fmt: skip
            if caught & HANDLED:
                return True
    return False


def unguarded(text: str) -> list[int]:
    """Lines with calls that Windows lacks and nothing asks about."""
    if not ANY.search(text):
        return []
    tree = ast.parse(text)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    return [node.lineno for node in posix_only(tree) if not is_guarded(node, parents)]  # type: ignore[attr-defined]


def test_calls_that_windows_lacks_are_guarded() -> None:
    modules = [path for room in ROOMS for path in room.rglob("*.py")]
    places = {path.relative_to(ROOT).as_posix(): unguarded(path.read_text(encoding="utf-8")) for path in modules}
    assert {path: lines for path, lines in places.items() if lines} == {}
    assert len(places) > 200


def test_unguarded_calls_are_seen() -> None:
    assert unguarded("import os\nos.fork()") == [2]
    assert unguarded("import fcntl") == [1]
    assert unguarded("if hasattr(os, 'fork'):\n    os.fork()") == []
    assert unguarded("try:\n    import resource\nexcept ImportError:\n    pass") == []
    assert unguarded("try:\n    import resource\nexcept ValueError:\n    pass") == [2]
    assert unguarded("n = os.sysconf('x') if hasattr(os, 'sysconf') else 0") == []


def test_a_stop_request_works_without_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIGALRM", "setitimer", "pthread_kill"):
        monkeypatch.delattr(signal, name)
    with StopRequest() as stop:
        with stop.abandoning(60):
            signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"


def test_the_machine_is_described_without_sysconf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(machine.os, "sysconf")
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "Path", lambda name: Path("/missing"))
    (device,) = machine.devices()
    assert device.total == math.inf
    assert "memory unknown" in str(device)


def test_paths_of_windows_are_no_formats_and_no_labels() -> None:
    assert split_forced(r"folder:C:\pictures@val") == (r"folder:C:\pictures", "val")
    assert split_location(r"C:\pictures?caps=no") == (r"C:\pictures", "caps=no")
    with pytest.raises(UserError, match=r"'C:\\\\pictures' does not exist\. Give the path of your data"):
        open_reader(r"C:\pictures", "train")
    with pytest.raises(UserError, match=r"nothing at|does not exist|no such"):
        open_reader(r"folder:C:\pictures", "train")
    assert [entry.label for entry in entries([r"C:\mine.yaml", "a:t2i_tiny"])] == [r"C:\mine.yaml", "a"]
