"""The optimisers, AdamW or Muon, with decay groups, and the learning rate as a function of the step."""

import math
import re
from typing import Any

import torch
from torch import nn

# Leaf names of learned tables, queries and single tokens, which are embeddings without being an nn.Embedding.
_EMBEDDING_NAME = re.compile(r"(^|_)(pos|positions?|embeds?|embeddings?|tokens?|quer(y|ies)|context)(_|\d|$)")


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


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices in `hidden` and AdamW for all else, as one optimizer.

    A matrix moves by its orthogonalised momentum, scaled to the size of an AdamW update (Liu et al. 2025, section 2.2),
    so that both share the learning rate and the weight decay of a recipe.
    groups: as `decay_groups` gives them; betas: AdamW's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], hidden: set[nn.Parameter], *, lr: float, betas: tuple[float, float]
    ) -> None:
        matrices, rest = [], []
        for group in groups:
            inside = [parameter for parameter in group["params"] if parameter in hidden]
            outside = [parameter for parameter in group["params"] if parameter not in hidden]
            matrices += [group | {"params": inside}] if inside else []
            rest += [group | {"params": outside}] if outside else []
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=betas, foreach=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Makes both parts use this optimizer's groups and state, which are the ones saved and loaded."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any optimizer; both parts use the loaded groups and state."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both parts with the current gradients."""
        assert closure is None, "closures are not supported"
        for part in self.parts:
            part.step()


def build_optimizer(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    name: str = "adamw",
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer `name`, adamw or muon, over the trainable parameters of `module`, which is already on its device.

    scaled: gradients are scaled (fp16); the fused kernel would then hide skipped steps, so the foreach form is used.
    """
    groups = decay_groups(module, weight_decay)
    assert groups, "the objective has no trainable parameter"
    if name == "muon":
        return Muon(groups, hidden_matrices(module), lr=lr, betas=betas)
    assert name == "adamw", name
    fused = groups[0]["params"][0].is_cuda and not scaled
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused, foreach=not fused)
