"""Messages for failures from outside: out of memory, or the death of a loader worker or of another process.

The libraries raise plain RuntimeErrors for these, which only their messages distinguish.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from crossflow.core.config import TrainConfig
from crossflow.core.distributed import LostProcess
from crossflow.core.errors import UserError
from crossflow.core.files import size_in_words
from crossflow.core.training.stream import WorkerDied

_CPU_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory")
_WORKER = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([\w ]+)")
_SIGNALS = {signal.strsignal(number): number for number in signal.Signals}


class NoMemory(Exception):
    """The memory did not suffice for the gradients of a step, of which nothing is kept."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that the memory of the device, or of the machine, is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, NoMemory)):
        return True
    return isinstance(error, RuntimeError) and _CPU_MEMORY.search(str(error)) is not None


@contextmanager
def explained(config: TrainConfig, memory: Callable[[], str], kept: Callable[[], str]) -> Iterator[None]:
    """Turns the failures of a training into UserErrors of one paragraph.

    memory: what the memory is used for, a sentence. kept: what is left of the run, the last sentences.
    """
    try:
        yield
    except (RuntimeError, MemoryError, NoMemory, WorkerDied) as error:
        if is_out_of_memory(error):
            text = f"Out of memory. {memory()} {_less_memory(config)}"
        else:
            text = _worker(error)
        if not text:
            raise
        raise UserError(f"{text} {kept()}") from error
    except LostProcess as error:
        raise UserError(f"{error} {kept()}") from error


def memory_in_words(device: torch.device, parts: Mapping[str, int], size: int) -> str:
    """The use of a device's memory, a sentence. parts: bytes by name; size: samples of a part of a step."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    used = ", ".join(f"{name} {size_in_words(number)}" for name, number in parts.items())
    of = f" of {size_in_words(total)}" if total else ""
    return (
        f"The device {device}{of} holds {used}; the rest is for the activations of {size} samples at a time "
        "(and other processes)."
    )


def _less_memory(config: TrainConfig) -> str:
    ways = [f"train.accumulate={2 * config.accumulate} (the same steps, half the samples at a time)"]
    ways += [] if config.auto_micro_batch else ["train.auto_micro_batch=true (which does this as needed)"]
    ways += [] if config.checkpointing else ["train.checkpointing=true (more time)"]
    ways += ["train.precision=bf16"] if config.precision == "no" else []
    return f"To need less: {', '.join(ways)}, a smaller train.batch_size or a smaller backbone."


def _worker(error: BaseException) -> str:
    """Why a loader worker ended; "" if the error is about something else."""
    if isinstance(error, WorkerDied):
        pid, number = str(error.pid), -error.exit_code
    elif match := _WORKER.search(str(error)):  # torch noticed it in the middle of a step
        pid, number = match.group(1), _SIGNALS.get(match.group(2).strip(), 0)
    else:
        return ""
    name = signal.Signals(number).name if number > 0 else ""  # Windows has neither of these two
    if name == "SIGKILL":
        advice = (
            "Usually the machine has run out of memory: lower train.num_workers (0 loads in the training process), or "
            "the size of the pictures."
        )
    elif name == "SIGBUS":
        advice = (
            "The shared memory of the machine (/dev/shm) is full: enlarge it (docker run --shm-size), or lower "
            "train.num_workers or the batch."
        )
    else:
        advice = "A library that reads the data has crashed: train.num_workers=0 shows where."
    how = f"was killed by {name}" if name else f"ended with status {-number}"
    return f"The loader worker (process {pid}) {how}. {advice}"
