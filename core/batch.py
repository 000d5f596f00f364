"""What travels from a task to the core: a training batch, what sampling starts from, a baseline's condition.

B batch, N tokens, D width, C channels, H W height width.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class _Tensors:
    """What a frozen dataclass of tensors (and of such dataclasses) can do: move to a device, take rows."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Everything on `device`; tensors in half precision, as a feature cache keeps them, become float32 there."""
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Tensors)):
                value = moved[field.name] = value.to(device, non_blocking=non_blocking)
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                moved[field.name] = value.float()
        return replace(self, **moved)  # type: ignore[type-var]

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The same with some rows of every tensor."""
        chosen = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Tensors)):
                chosen[field.name] = value[rows]
        return replace(self, **chosen)  # type: ignore[type-var]


@dataclass(frozen=True)
class Condition(_Tensors):
    """What a noise-source baseline sees besides z_t; CrossFlow itself has none. Guidance drops it.

    `tokens` (B, N, D) or raw features that the model's condition encoder turns into such, `mask` (B, N) bool, True =
    token; `grid` (B, C, H, W), concatenated to z_t along channels.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    grid: Tensor | None = None


@dataclass(frozen=True)
class Source(_Tensors):
    """What sampling starts from: the part of a batch that is known without the target. Fields as in `Batch`."""

    features: Tensor
    mask: Tensor | None = None
    condition: Condition | None = None

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Batch(_Tensors):
    """One training batch, all that the objective needs.

    `features` (B, ...) what the source encoder reads, `mask` (B, N) bool for token features, `target` z1 (B, *latent),
    `weight` (B, ...) broadcastable to the target (0 where the target value is missing; the target is finite there too),
    `condition` for the baselines,
    `alignment` (B, ...) whatever the encoder loss compares z0 with, `ids` one name per sample.
    `unconditional` (B,) bool: the samples whose indicator is dropped and whose target is already that of another
    sample, see `Objective.draw`; None: not drawn yet. `fraction` of the samples of the optimizer step that this batch
    holds, below 1 when the step is divided among processes or accumulated parts.
    """

    features: Tensor
    target: Tensor
    mask: Tensor | None = None
    weight: Tensor | None = None
    condition: Condition | None = None
    alignment: Tensor | None = None
    ids: tuple[str, ...] = ()
    unconditional: Tensor | None = None
    fraction: float = 1.0

    def __len__(self) -> int:
        return len(self.target)
