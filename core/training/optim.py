"""The optimiser of all recipes: AdamW with decay groups, and the learning rate as a function of the step."""

import math
import re

import torch
from torch import nn

# Leaf names of learned tables and single tokens, which are embeddings without being an nn.Embedding.
_EMBEDDING_NAME = re.compile(r"(^|_)(pos|positions?|embeds?|embeddings?|tokens?)(_|\d|$)")


def learning_rate(
    step: int, *, lr: float, warmup_steps: int = 0, steps: int = 0, schedule: str = "constant", final_lr: float = 0.0
) -> float:
    """The learning rate of the optimizer step that follows `step` completed ones.

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

    It does not on norms, biases, everything with at most one dimension, embeddings (also learned positions and tokens),
    nor on names that contain `nodecay`.
    """
    if parameter.ndim <= 1 or "nodecay" in name or name == "bias":
        return False
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "norm" in type(module).__name__.lower():
        return False
    return not _EMBEDDING_NAME.search(name)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters of `module` in two groups, with and without weight decay, each in the module's order."""
    decayed: dict[nn.Parameter, None] = {}
    spared: dict[nn.Parameter, None] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                (decayed if is_decayed(owner, name, parameter) else spared)[parameter] = None
    # A shared parameter that any of its owners spares is spared.
    groups = [
        {"params": [parameter for parameter in decayed if parameter not in spared], "weight_decay": weight_decay},
        {"params": list(spared), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, scaled: bool = False
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`, which is already on its device.

    scaled: gradients are scaled (fp16); the fused kernel would then hide skipped steps, so the foreach form is used.
    """
    groups = decay_groups(module, weight_decay)
    assert groups, "the objective has no trainable parameter"
    fused = groups[0]["params"][0].is_cuda and not scaled
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused, foreach=not fused)
