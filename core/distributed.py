"""Processes of one run: who am I, and tensors from all of them. Without torch.distributed every function is a no-op.

W ranks; every rank holds the same number of samples B, in rank order: global sample = rank * B + local sample.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
    """The tensors (B, ...) of all ranks, in rank order: (W * B, ...), without gradients. All ranks give the same shape."""
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
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        num_local: int = ctx.num_local  # type: ignore[attr-defined]
        return gradient[rank() * num_local : (rank() + 1) * num_local]


def gather_with_grad(tensor: Tensor) -> Tensor:
    """As `gather`, but differentiable: (B, ...) -> (W * B, ...), and the backward pass sends gradients to every rank.

    The gradient of a rank's slice is the *sum* over ranks of what they send to it. Data-parallel training then averages the
    parameter gradients over ranks, that is, it optimises the mean of the ranks' losses; so the result is the gradient of one
    process with the global batch, both when each rank computes the loss of the whole global batch (W equal losses) and when
    each computes the mean over its own rows against everybody's columns.
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


def broadcast_text(text: str) -> str:
    """The text of rank 0, on every rank."""
    if not is_distributed():
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]
