"""Processes of one run: who am I, and tensors from all of them. Without torch.distributed every function is a no-op.

W ranks; every rank holds the same number of samples B, in rank order: global sample = rank * B + local sample.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from crossflow.core.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def announced() -> bool:
    """Whether a launcher has announced several processes, joined or not."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def device() -> torch.device:
    """The device of this process. The first call joins the group of processes that a launcher has announced."""
    from accelerate import PartialState

    # Told nothing, accelerate takes several processes without a GPU for as many runs of one process.
    state = PartialState(cpu=announced() and not torch.accelerator.is_available())
    if is_distributed():
        atexit.register(_leave)
    found: torch.device = state.device
    return found


def _leave() -> None:
    """Leaves the group of processes; a process that ends as a member may be aborted by the group's threads."""
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


def barrier() -> None:
    """Waits until every process is here."""
    if is_distributed():
        dist.barrier()


def gather(tensor: Tensor) -> Tensor:
    """The tensors (B, ...) of all ranks, in rank order: (W * B, ...), without gradients; all give the same shape."""
    if not is_distributed():
        return tensor.detach()
    # Some backends know no bool.
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

    The gradient of a rank's slice is the *sum* over ranks of what they send to it. Data-parallel training then
    averages the parameter gradients over ranks, that is, it optimises the mean of the ranks' losses; so the result is
    the gradient of one process with the global batch, both when each rank computes the loss of the whole global batch
    (W equal losses) and when each computes the mean over its own rows against everybody's columns.
    """
    if not is_distributed():
        return tensor
    gathered: Tensor = _GatherWithGrad.apply(tensor)
    return gathered


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks of a tensor of any shape, the same on each; without gradients."""
    if not is_distributed():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise maximum over ranks, the same on each; without gradients."""
    if not is_distributed():
        return tensor.detach()
    largest = tensor.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def on_main(action: Callable[[], str]) -> str:
    """Runs `action` on rank 0 alone; every rank returns its text, or raises what it raised (elsewhere as UserError)."""
    text, error = "", None
    if is_main():
        try:
            text = action()
        except Exception as raised:
            error = raised
    if is_distributed():
        box = [text, None if error is None else str(error)]
        dist.broadcast_object_list(box, src=0)
        text = box[0] or ""
        if error is None and box[1] is not None:
            error = UserError(box[1])
    if error is not None:
        raise error
    return text


def shared(parts: Sequence[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """`work` on each of the parts, one per rank at a time: rank 0 gets (part, its result) in order, the others nothing.

    Every rank must go through all of it. What `work` raises on any rank is raised on all of them. Results must be such
    as can be pickled.
    """
    for first in range(0, len(parts), world_size()):
        together = parts[first : first + world_size()]
        results: list[R] = []
        problem: Exception | None = None
        if rank() < len(together):
            try:
                results.append(work(together[rank()]))
            except Exception as raised:
                problem = raised
        _raise_everywhere(problem)
        yield from zip(together, _on_first(results), strict=False)


def _raise_everywhere(problem: Exception | None) -> None:
    """Raises a rank's own problem there, and what the first rank with one met on the others."""
    said = [None if problem is None else (isinstance(problem, UserError), f"{type(problem).__name__}: {problem}")]
    if is_distributed():
        heard: list[tuple[bool, str] | None] = [None] * world_size()
        dist.all_gather_object(heard, said[0])
        said = heard
    if problem is not None:
        raise problem
    for number, what in enumerate(said):
        if what is not None:
            user, text = what
            raise UserError(text.partition(": ")[2]) if user else RuntimeError(f"process {number} met {text}")


def _on_first(mine: list[R]) -> list[R]:
    """On rank 0 what all ranks give, in rank order; elsewhere nothing."""
    if not is_distributed():
        return mine
    boxes: list[list[R]] | None = [[] for _ in range(world_size())] if is_main() else None
    dist.gather_object(mine, boxes, dst=0)
    return [] if boxes is None else [value for box in boxes for value in box]
