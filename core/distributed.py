"""The processes of a run: rank, and communication between ranks. With one process no function communicates.

W ranks; every rank holds the same number of samples B, in rank order: global sample = rank * B + local sample.
"""

import atexit
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from crossflow.core import launcher
from crossflow.core.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")
# The texts of gloo, which raises RuntimeErrors.
_LOST = re.compile(r"[Cc]onnection (closed|reset)|Broken pipe|Timed out waiting|Socket Timeout|pair closure|gloo")
_REPORTS = 5.0  # seconds within which processes that lost another one learn of each other

_limit = timedelta(minutes=30)  # of the waiting for other processes
_setting = ""  # that decides it
_own_work: Callable[[], AbstractContextManager[object]] = nullcontext


class LostProcess(UserError):
    """Another process has ended, or has not answered for as long as `limit_waiting` allows.

    Args:
        purpose: what this process waited for.
        silent: ranks of the processes that are lost; empty if that cannot be known.
        reason: the words of the library.
    """

    def __init__(self, purpose: str, silent: Sequence[int], reason: str) -> None:
        numbers = ", ".join(map(str, silent))
        who = f"process{'es' * (len(silent) > 1)} {numbers}" if silent else "another process"
        verb = "have" if len(silent) > 1 else "has"
        limit = f"{_limit.total_seconds() / 60:g} minutes{_setting and f' ({_setting})'}"
        super().__init__(
            f"{who[0].upper()}{who[1:]} {verb} ended, or {verb} not answered for {limit}, while this one waited for "
            f"{purpose}, so it ends as well ({reason}). What {who} printed has the cause."
        )
        self.silent, self.reason = tuple(silent), reason


class Abandoned(BaseException):  # as KeyboardInterrupt: nothing that handles errors of its own work stops it
    """Work was given up because of a stop request, whose name is the text."""


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def device() -> torch.device:
    """The device of this process. The first call joins the processes that a launcher started together."""
    from accelerate import PartialState

    # Without `cpu`, accelerate treats several processes on a machine without a GPU as separate runs. The timeout is
    # that of a process group, which a single process lacks.
    several = launcher.world_size() > 1
    with waiting_for("all processes to start"):
        state = PartialState(
            cpu=several and not torch.accelerator.is_available(), **({"timeout": _limit} if several else {})
        )
    if is_distributed():
        _reports()
        atexit.register(_leave)
    device: torch.device = state.device
    return device


def _leave() -> None:
    """Leaves the process group, whose threads may abort a process that exits as a member."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes, at least 1."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


def limit_waiting(minutes: float, setting: str) -> None:
    """Sets how long a process waits for another one, in anything that they do together, before it ends with an error
    that names `setting`.

    To be called before `device`: gloo connects with the limit that it began with.
    """
    global _limit, _setting
    _limit, _setting = timedelta(minutes=minutes), setting
    if is_distributed():
        from torch.distributed.distributed_c10d import _set_pg_timeout

        _set_pg_timeout(_limit, dist.group.WORLD)


def new_cpu_group() -> dist.ProcessGroup:
    """A group of all processes, on the CPU, whose exchanges do not mix with others; every process must call this."""
    group = dist.new_group(backend="gloo", timeout=_limit)
    assert isinstance(group, dist.ProcessGroup)
    return group


def new_store() -> dist.Store:
    """A connection to the store by which the processes joined, for short texts under names; for one thread.

    Every process must call this, and gets its connection when all have theirs: one that connects to a store whose
    process has ended meanwhile tries again for half an hour.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store().clone()
    barrier()
    return store


@contextmanager
def waiting_for(purpose: str) -> Iterator[None]:
    """Context in which processes wait for each other. Raises LostProcess when another one has ended or hangs.

    purpose: what they wait for, such as "the gradients of step 12"; of nested contexts the outermost counts.
    """
    try:
        yield
    except LostProcess as error:
        raise LostProcess(purpose, error.silent, error.reason) from error
    except Exception as error:
        reason = _lost(error)
        if not reason:
            raise
        raise LostProcess(purpose, _silent(), reason) from error


def _lost(error: BaseException) -> str:
    """The reason, in the words of the library, if an error means that another process ended or hangs; else ""."""
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(text)):
        return text.rpartition("] ")[2].strip()[:200] or type(error).__name__
    return ""


def _silent() -> list[int]:
    """The ranks that do not report, as this process does, that they have lost another one; none if there is no telling.

    The reports pass through the store by which the processes joined.
    """
    if not is_distributed():
        return []
    others = [number for number in range(world_size()) if number != rank()]
    patience = min(_REPORTS, _limit.total_seconds())
    deadline = time.monotonic() + patience
    answers: list[list[int]] = []

    def ask() -> None:
        silent, store = others, _reports()
        with suppress(RuntimeError):
            store.set(f"crossflow/lost/{rank()}", "")
            while silent and time.monotonic() < deadline:
                time.sleep(0.05)
                silent = [number for number in silent if not store.check([f"crossflow/lost/{number}"])]
            answers.append(silent)

    # Beside this thread, which would wait for ever for a store whose process hangs.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * patience)
    if answers:
        return answers[0]
    # Without an agent of torchrun the store lies in the first process.
    return [0] if rank() and not launcher.has_agent() else []


@cache
def _reports() -> dist.Store:
    """A connection for `_silent`, made while all processes are there."""
    return new_store()


@contextmanager
def own_work_within(context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Context in which the work that `on_main` and `shared` give to each process is done inside `context()`.

    An `Abandoned` that this raises on any process is raised on all of them, once their own work is done.
    """
    global _own_work
    before, _own_work = _own_work, context
    try:
        yield
    finally:
        _own_work = before


def barrier() -> None:
    """Waits until every process has reached this call."""
    if is_distributed():
        dist.barrier()


def gather(tensor: Tensor) -> Tensor:
    """The tensors (B, ...) of all ranks in rank order: (W * B, ...), without gradients; shapes must be equal."""
    if not is_distributed():
        return tensor.detach()
    # Some backends do not support bool.
    local = tensor.detach().to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach()
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts).to(tensor.dtype)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        ctx.num_local = len(tensor)  # type: ignore[attr-defined]
        return gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        num_local: int = ctx.num_local  # type: ignore[attr-defined]
        return gradient[rank() * num_local : (rank() + 1) * num_local]


def gather_with_grad(tensor: Tensor) -> Tensor:
    """As `gather`, but differentiable: (B, ...) -> (W * B, ...), and the backward pass sends gradients to every rank.

    The gradient of a rank's slice is the *sum* of its gradients over ranks. Data-parallel training then
    averages the parameter gradients over ranks, that is, it optimises the mean of the ranks' losses; so the result is
    the gradient of one process with the global batch, both when each rank computes the loss of the whole global batch
    (W equal losses) and when each computes the mean over its own rows against the columns of all ranks.
    """
    if not is_distributed():
        return tensor
    gathered: Tensor = _GatherWithGrad.apply(tensor)
    return gathered


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks of a tensor of any shape, without gradients; every rank gets it."""
    if not is_distributed():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise maximum over ranks, without gradients; every rank gets it."""
    if not is_distributed():
        return tensor.detach()
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def on_main(action: Callable[[], R]) -> R:
    """Runs `action` on rank 0 alone; every rank returns its result (picklable), or raises its error, see `shared`."""
    results, problem = _attempt(lambda work: work(), [action] if is_main() else [])
    with waiting_for("the first process"):
        _raise_everywhere(problem)
        if is_distributed():
            results = results or [cast(R, None)]
            dist.broadcast_object_list(results, src=0)
    return results[0]


def shared(parts: Sequence[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """`work` on each of the parts, one per rank at a time: rank 0 gets (part, its result) in order, the others nothing.

    Every rank must exhaust the iterator. An error of `work` is raised unchanged on its own rank, and on the others as a
    UserError if it is a UserError or OSError, otherwise as a RuntimeError. Results must be picklable.
    """
    for group in _groups(parts):
        results, problem = _attempt(work, group[rank() : rank() + 1])
        with waiting_for("the others' results"):
            _raise_everywhere(problem)
            collected = on_first(results)
        yield from zip(group, collected, strict=False)


def shared_in_stages(
    parts: Sequence[T], work: Callable[[T], R], finish: Callable[[R], S], *, finish_on_first: bool = False
) -> Iterator[tuple[T, S]]:
    """As `shared`, in two stages: `finish` makes the result of what `work` returns, in a thread beside the work on the
    next part, so that a device need not wait for the host. At most one group of results is being finished at a time.

    finish_on_first: rank 0 finishes the parts of all ranks, in order, as where files are written; otherwise each rank
    its own.
    """
    with ThreadPoolExecutor(1) as beside:
        waiting: tuple[Sequence[T], list[Future[S]]] = (), []
        for group in [*_groups(parts), ()]:
            values, problem = _attempt(work, group[rank() : rank() + 1])
            results, late = _attempt(Future.result, waiting[1])
            with waiting_for("the others' results"):
                _raise_everywhere(late)
                collected = on_first(results)
            yield from zip(waiting[0], collected, strict=False)
            with waiting_for("the others' results"):
                _raise_everywhere(problem)
                values = on_first(values) if finish_on_first else values
            waiting = group, [beside.submit(finish, value) for value in values]


def _groups(parts: Sequence[T]) -> Iterator[Sequence[T]]:
    """The parts, one per rank at a time."""
    for first in range(0, len(parts), world_size()):
        yield parts[first : first + world_size()]


def _attempt(action: Callable[[T], R], values: Iterable[T]) -> tuple[list[R], BaseException | None]:
    """The results of `action` on the values, and the error that ended it."""
    results: list[R] = []
    try:
        for value in values:
            with _own_work():
                results.append(action(value))
    except (Exception, Abandoned) as error:
        return results, error
    return results, None


def _raise_everywhere(problem: BaseException | None) -> None:
    """Raises an error on its own rank, and the error of the lowest failing rank on the others."""
    own = None if problem is None else (_kind(problem), type(problem).__name__, str(problem))
    reports: list[tuple[str, str, str] | None] = [own] * world_size()
    if is_distributed():
        dist.all_gather_object(reports, own)
    stops = [report[2] for report in reports if report is not None and report[0] == "abandoned"]
    if stops:
        raise Abandoned(stops[0])
    if problem is not None:
        raise problem
    for number, report in enumerate(reports):
        if report is not None:
            kind, name, text = report
            raise UserError(text) if kind == "user" else RuntimeError(f"process {number} raised {name}: {text}")


def _kind(problem: BaseException) -> str:
    if isinstance(problem, Abandoned):
        return "abandoned"
    return "user" if isinstance(problem, (UserError, OSError)) else "internal"


def on_first(results: list[R]) -> list[R]:
    """The results of all ranks in rank order on rank 0; elsewhere none."""
    if not is_distributed():
        return results
    boxes: list[list[R]] | None = [[] for _ in range(world_size())] if is_main() else None
    dist.gather_object(results, boxes, dst=0)
    return [] if boxes is None else [value for box in boxes for value in box]
