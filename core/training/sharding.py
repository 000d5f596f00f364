"""Sharding (FSDP2): every process holds a part of each weight, with its gradient, average and optimizer state.

A tensor of n rows on W processes: process r holds the r-th of W runs of ceil(n / W) rows (the last may be shorter or
empty). The rows of a block are gathered before it computes and dropped afterwards; gradients are averaged and divided
in one exchange. Weights and gradients travel in float32, so the losses are those of one process up to rounding. Scalars
stay whole on every process. A tensor divided in this way is a DTensor.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossflow.core import distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(root: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Shards, in place, the parameters of `root`: those of each of its `blocks` together, then all others.

    Every process must hold the same values. The parameters are replaced by new ones.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(distributed.device().type, (distributed.world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    scalars = {parameter for parameter in root.parameters() if parameter.ndim == 0}
    fully_shard(root, mesh=mesh, ignored_params=scalars)


def is_divided(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this process holds some rows of the tensor; without `shard` there are no such tensors."""
    # Loading this module takes longer than loading the rest of a training.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds, without gradient and in the same memory; all of a whole one."""
    tensor = tensor.detach()
    return tensor.to_local() if is_divided(tensor) else tensor


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """The tensor divided as `tensor` is, of which this process holds `rows`; `rows` itself if `tensor` is whole."""
    if not is_divided(tensor):
        return rows
    mesh, placements, shape = tensor.device_mesh, tensor.placements, tensor.shape
    return type(tensor).from_local(rows, mesh, placements, run_check=False, shape=shape, stride=tensor.stride())


def own_rows(tensor: Tensor) -> slice:
    """The rows of a tensor that this process holds; not of a scalar."""
    if not is_divided(tensor):
        return slice(0, len(tensor))
    size = -(-len(tensor) // distributed.world_size())
    start = min(len(tensor), size * distributed.rank())
    return slice(start, min(len(tensor), start + size))


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor; every process must call it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, of which none mixes divided and whole parameters: its kernels refuse that."""
    parts = []
    for group in groups:
        for divided in (True, False):
            chosen = [parameter for parameter in group["params"] if is_divided(parameter) == divided]
            parts += [group | {"params": chosen}] if chosen else []
    return parts


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Averages over the processes the gradients that FSDP leaves alone: those of the scalars."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        if not is_divided(gradient):
            gradient.copy_(distributed.mean_over_ranks(gradient))


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar, the same on every process."""
    divided = [local(gradient) for gradient in gradients if is_divided(gradient)]
    scalars = [gradient for gradient in gradients if not is_divided(gradient)]
    squares = torch.stack(torch._foreach_norm(divided)).square().sum()
    dist.all_reduce(squares)
    return (squares + sum(scalar.square() for scalar in scalars)).sqrt()


def clip(gradients: Sequence[Tensor], largest: float, norm: Tensor) -> None:
    """Scales gradients of total norm `norm` down to the norm `largest`, as torch.nn.utils.clip_grads_with_norm_."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], (largest / (norm + 1e-6)).clamp(max=1.0))


@contextmanager
def assembled(root: nn.Module) -> Iterator[None]:
    """Context in which every process has the whole weights of `root`, in plain modules that exchange nothing.

    Every process must enter it; inside, they need not do the same.
    """
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    # A sharded module counts its forwards to gather ahead in the backward pass, and drops its whole weights when it is
    # moved, even to where it is. The class in front of its own does the latter.
    kinds = [type(module) for module in modules]
    hooks = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        module.__class__ = kind.__bases__[1]
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    try:
        yield
    finally:
        for module, kind, (before, after) in zip(modules, kinds, hooks, strict=True):
            module.__class__ = kind
            module._forward_pre_hooks.update(before)
            module._forward_hooks.update(after)
            module.reshard()
