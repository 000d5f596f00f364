"""Sums over the similarities of this rank's rows to the rows of all ranks, in chunks: memory does not grow with ranks.

s_ij = exp(log_temperature) a_i . b_j + bias, where i is a row of this rank and j one of any rank; the sum of row i is
log sum_j exp(s_ij) for the softmax loss, sum_j log(1 + exp(s_ij)) for the sigmoid loss. Each rank gives some of its
rows at a time to all others, forward and again backward, so only one chunk of rows and similarities exists at once.
B rows of a rank, W ranks, D values of a row.
"""

from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from crossflow.core.distributed import gather, rank, world_size

MAX_VALUES = 2**25
"""Largest number of values of the gathered rows (128 MiB in float32) that are kept whole."""


def are_many(rows: Tensor) -> bool:
    """Whether the rows (B, D) of all ranks together have more than MAX_VALUES values."""
    return world_size() > 1 and world_size() * rows.numel() > MAX_VALUES


def sums(a: Tensor, b: Tensor, log_temperature: Tensor, bias: Tensor, kind: Literal["softmax", "sigmoid"]) -> Tensor:
    """The sum of each row of `a` (B, D) over the rows of `b` (B, D) of all ranks: (B,) float32, with gradients.

    log_temperature, bias: scalars. Every rank must call it, and differentiate it or not, together; the gradients are
    those of `distributed.gather_with_grad`.
    """
    return cast(Tensor, _Sums.apply(a, b, log_temperature, bias, kind))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor, log_temperature: Tensor, bias: Tensor, kind: str) -> Tensor:
        a, b, scale, bias = a.float(), b.float(), log_temperature.float().exp(), bias.float()
        total = torch.full((len(a),), -torch.inf if kind == "softmax" else 0.0, device=a.device)
        with torch.autocast(a.device.type, enabled=False):
            for rows in _chunks(b):
                similarities = scale * a @ gather(b[rows]).T + bias
                if kind == "softmax":
                    total = torch.logaddexp(total, similarities.logsumexp(1))
                else:
                    total = total + F.softplus(similarities).sum(1)
        ctx.save_for_backward(a, b, scale, bias, total)
        ctx.kind = kind  # type: ignore[attr-defined]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, bias, total = ctx.saved_tensors  # type: ignore[attr-defined]
        kind: str = ctx.kind  # type: ignore[attr-defined]
        for_a, for_b = torch.zeros_like(a), torch.empty_like(b)
        for_scale, for_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        with torch.autocast(a.device.type, enabled=False):
            for rows in _chunks(b):
                others = gather(b[rows])
                similarities = scale * a @ others.T + bias
                shares = (similarities - total[:, None]).exp() if kind == "softmax" else similarities.sigmoid()
                shares = shares * gradient[:, None]
                for_a += scale * shares @ others
                of_all = scale * shares.T @ a
                dist.all_reduce(of_all)
                num = rows.stop - rows.start
                for_b[rows] = of_all[rank() * num : (rank() + 1) * num]
                for_scale += (shares * (similarities - bias)).sum()
                for_bias += shares.sum()
        return for_a, for_b, for_scale, for_bias, None


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows (B, D), such that those of all ranks have about MAX_VALUES values; the same on every rank."""
    size = max(1, MAX_VALUES // (world_size() * rows.shape[1]))
    for start in range(0, len(rows), size):
        yield slice(start, min(len(rows), start + size))
