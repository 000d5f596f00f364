"""`Forked`: a program in a process of its own, forked from another that has already imported what takes seconds.

Importing torch and transformers takes longer than most of what tests let such a process do. It starts as a fresh
interpreter does: nothing of the test's process is in it but what the request names, and it can be killed.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

_IMPORTS = ["torch._dynamo", "accelerate", "diffusers.models.autoencoders", "transformers.modeling_utils", "evaluate"]
_IMPORTS += ["crossflow.engine.train", "crossflow.benchmarks.evaluation.evaluate"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(_IMPORTS)


class Forked:
    """Runs `python ARGUMENTS` (a program or `-m module`, and what it is given); what it prints goes to a file.

    Args:
        arguments: as behind `python`.
        output: file for standard output and errors.
        variables: environment beside that of the tests.
        own_session: whether the process leads a process group of its own.
    """

    def __init__(self, arguments: list[str], output: Path, *, own_session: bool = False, **variables: str) -> None:
        self._output = output
        request = {
            "arguments": arguments,
            "output": str(output),
            "own_session": own_session,
            "folder": os.getcwd(),
            # Without a GPU even where there is one: processes must not share it.
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables},
        }
        self._process = SERVER.Process(target=runpy.run_path, args=(__file__, {"REQUEST": request}, "__main__"))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit status, -N after signal N; None while the process runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing happens if the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, seconds: float = 240) -> int:
        """The exit status; a process that does not end is killed, and the test fails."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise AssertionError(f"no end after {seconds} s: {self.output()}")
        return self._process.exitcode

    def output(self) -> str:
        """What the process has printed."""
        return self._output.read_text(encoding="utf-8") if self._output.exists() else ""

    def finish(self, status: int = 0) -> str:
        """Waits for the end with this exit status; returns what was printed."""
        assert self.wait() == status, self.output()
        return self.output()


def ranks(num: int, arguments: list[str], folder: Path) -> list[Forked]:
    """As many processes that do the work of one, with the variables that a launcher sets."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(port)
    return [
        Forked(arguments, folder / f"rank{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **variables)
        for rank in range(num)
    ]


def _run(request: dict[str, Any]) -> None:
    """In the forked process."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["own_session"]:
        os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.fsync = lambda handle: None  # as in conftest.py
    multiprocessing.set_start_method(None, force=True)  # that of a fresh interpreter; the server leaves its own
    name, *sys.argv[1:] = request["arguments"]
    if name == "-m":
        name = sys.argv.pop(1)
        sys.argv[0] = name
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = name
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    _run(globals()["REQUEST"])
