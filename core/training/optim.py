"""The optimisers, AdamW or Muon, with decay groups, and the learning rate as a function of the step."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.training.sharding import apart, like, local, own_rows, whole

# Leaf names of learned tables, queries and single tokens, which are embeddings without being an nn.Embedding.
_EMBEDDING_NAME = re.compile(r"(^|_)(pos|positions?|embeds?|embeddings?|tokens?|quer(y|ies)|context)(_|\d|$)")
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Values orthogonalised at a time: beyond this a larger batch gains nothing and its copies take memory.
_MUON_BATCH = 2**26


def learning_rate(
    step: int, *, lr: float, warmup_steps: int = 0, steps: int = 0, schedule: str = "constant", final_lr: float = 0.0
) -> float:
    """The learning rate of the optimizer step after `step` completed ones.

    Linear warm-up, lr (step + 1) / warmup_steps, reaches `lr` with the last warm-up step. Then `constant`, or `cosine`:
    final_lr + (lr - final_lr) (1 + cos(pi p)) / 2 with p from 0 at the end of the warm-up to 1 at the last of `steps`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    assert schedule == "cosine", schedule
    progress = min(1.0, (step + 1 - warmup_steps) / max(1, steps - warmup_steps))
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2


def is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on the parameter that `module` calls `name` (a leaf name, without dots).

    It does not on norms, biases, everything with at most one dimension, embeddings (also learned positions, queries and
    tokens), nor on names that contain `nodecay`.
    """
    if parameter.ndim <= 1 or "nodecay" in name or name == "bias":
        return False
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "norm" in type(module).__name__.lower():
        return False
    return not _EMBEDDING_NAME.search(name)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters of `module` in two groups, with and without weight decay, each in the module's order."""
    decayed: dict[nn.Parameter, None] = {}
    undecayed: dict[nn.Parameter, None] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                (decayed if is_decayed(owner, name, parameter) else undecayed)[parameter] = None
    # A shared parameter is decayed only if all its owners would decay it.
    groups = [
        {"params": [parameter for parameter in decayed if parameter not in undecayed], "weight_decay": weight_decay},
        {"params": list(undecayed), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """The decayed matrices of the blocks (members of module lists) of `module`, where Muon acts: first and last layers,
    tables and the heads of the losses are left to AdamW.
    """
    blocks = [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part]
    return {
        parameter
        for block in blocks
        for owner in block.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.ndim == 2 and is_decayed(owner, name, parameter)
    }


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: (n, r, c) with r <= c -> the same in bfloat16, singular values near 1.

    Five steps of the quintic Newton-Schulz iteration X <- a X + (b A + c A^2) X, A = X X^T, whose coefficients bring
    the singular values to 0.7 ... 1.2 (Jordan et al. 2024). All n matrices share each product; bfloat16 suffices, since
    its errors of 1 % are far below that spread.
    """
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1, where it converges
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def fuses(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch has a fused AdamW, one pass over weights, gradients and state, for these parameters."""
    return all(parameter.device.type in _FUSED_DEVICES for parameter in parameters)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices in `hidden` and AdamW for all else, as one optimizer.

    A matrix moves by its orthogonalised Nesterov momentum, scaled to the size of an AdamW update (Liu et al. 2025,
    section 2.2), so that both share the learning rate and the weight decay of a recipe. Matrices of one shape, or its
    transpose, are orthogonalised together; sharded ones are gathered for it, by every process.
    groups: as `decay_groups` gives them; betas, fused: AdamW's; momentum: that of the matrices.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        hidden: set[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        fused: bool = False,
        momentum: float = 0.95,
    ) -> None:
        matrices, rest = [], []
        for group in groups:
            inside = [parameter for parameter in group["params"] if parameter in hidden]
            outside = [parameter for parameter in group["params"] if parameter not in hidden]
            matrices += [group | {"params": inside}] if inside else []
            rest += [group | {"params": outside}] if outside else []
        self.momentum, self.num_matrix_groups = momentum, len(matrices)
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, fused=fused, foreach=not fused) if rest else None
        self.found_inf: Tensor | None = None
        super().__init__([*matrices, *(self.adamw.param_groups if self.adamw else [])], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Makes AdamW use this optimizer's groups and state, which are the ones saved and loaded."""
        if self.adamw is not None:
            self.adamw.param_groups, self.adamw.state = self.param_groups[self.num_matrix_groups :], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any optimizer; AdamW uses the loaded groups and state."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all parameters with the current gradients; see `skip_if`."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups[: self.num_matrix_groups]:
            self._step_matrices(group)
        if self.adamw is not None:
            self.adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        moving = [matrix for matrix in group["params"] if matrix.grad is not None]
        if not moving:
            return
        gradients = [local(matrix.grad) for matrix in moving]
        for matrix in moving:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        averages = [local(self.state[matrix]["momentum_buffer"]) for matrix in moving]
        keep = 1 - group["lr"] * group["weight_decay"]
        if self.found_inf is not None:  # every operation on a skipped step then changes nothing
            skip = self.found_inf > 0
            gradients = [torch.where(skip, *pair) for pair in zip(averages, gradients, strict=True)]
            keep = torch.where(skip, 1.0, keep)
        torch._foreach_lerp_(averages, gradients, 1 - self.momentum)
        updates = torch._foreach_lerp(gradients, averages, self.momentum)
        weights = [local(matrix) for matrix in moving]
        torch._foreach_mul_(weights, keep)
        for numbers in _batches(moving):
            wide = torch.stack([_wide(_whole_update(moving[number], updates[number])) for number in numbers])
            scale = 0.2 * max(wide.shape[1:]) ** 0.5
            moves = orthogonalised(wide).to(updates[0].dtype)
            moves = moves if self.found_inf is None else moves * (1 - self.found_inf)
            for number, move in zip(numbers, moves.unbind(), strict=True):
                move = move if moving[number].shape == move.shape else move.mT
                weights[number].add_(move[own_rows(moving[number])], alpha=-group["lr"] * scale)


def _whole_update(matrix: Tensor, update: Tensor) -> Tensor:
    """All rows of the update of a sharded matrix, gathered in the type in which it is orthogonalised anyway."""
    return whole(like(matrix, update.bfloat16())) if matrix.shape != update.shape else update


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if that has the longer rows."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """The numbers of matrices of one shape or its transpose, at most _MUON_BATCH values together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(number)
    for shape, numbers in by_shape.items():
        size = max(1, _MUON_BATCH // math.prod(shape))
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def skip_if(optimizer: torch.optim.Optimizer, skip: Tensor) -> bool:
    """Makes the next step of a fused AdamW, or of Muon with one, change nothing if `skip`, a scalar, is 1 instead of 0.

    The device decides, so that the host need not wait for it. Returns False for other optimizers.
    """
    adamw = optimizer.adamw if isinstance(optimizer, Muon) else optimizer
    if adamw is not None and not adamw.defaults.get("fused"):
        return False
    for part in (optimizer, adamw):
        if part is not None:
            part.found_inf = skip  # type: ignore[attr-defined]  # the name that torch's fused kernels look for
    return True


def build_optimizer(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    name: str = "adamw",
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer `name` over the trainable parameters of `module`, which is already on its device.

    name: adamw, muon or adamw8bit. scaled: gradients are scaled (fp16); the fused kernel would then hide skipped steps,
    so the foreach form is used. Raises UserError if the library of adamw8bit is not installed.
    """
    groups = apart(decay_groups(module, weight_decay))
    assert groups, "the objective has no trainable parameter"
    fused = not scaled and fuses(parameter for group in groups for parameter in group["params"])
    if name == "muon":
        return Muon(groups, hidden_matrices(module), lr=lr, betas=betas, fused=fused)
    if name == "adamw8bit":
        return _adamw8bit(groups, lr, betas)
    assert name == "adamw", name
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused, foreach=not fused)


def _adamw8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW with averages of 8 bits in blocks (Dettmers et al. 2022); parameters below 4096 values keep float32."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "train.optimizer = adamw8bit needs bitsandbytes, which is not installed. Install it by pip install "
            '"crossflow-toolkit[eightbit]", or use train.optimizer=adamw.'
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=betas)
    return optimizer
