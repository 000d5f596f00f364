"""The tensors that a task passes to the core: `Batch` in training, `Source` in sampling, `Condition` of baselines; and
`Jump`, which a flow map reads beside the time.

B batch, N tokens, D width, C channels, H W height width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
Record: TypeAlias = dict[str, Any]
"""A batch as loader workers make it: by name tensors (B, ...) on the CPU, and tuples of B other values."""


def map_tensors(function: Callable[[Tensor], Tensor], value: T) -> T:
    """`value` with `function` applied to the tensors of (nested) dicts and dataclasses; everything else is kept.

    >>> map_tensors(torch.neg, {"x": torch.ones(2), "names": ("a", "b")})
    {'x': tensor([-1., -1.]), 'names': ('a', 'b')}
    """
    if isinstance(value, Tensor):
        return cast(T, function(value))
    if isinstance(value, dict):
        return cast(T, {name: map_tensors(function, item) for name, item in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)})
    return value


class _Tensors:
    """Base of frozen dataclasses of tensors, possibly nested, that are moved to a device and indexed as a whole."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy on `device`, where half-precision tensors (as stored in a feature cache) become float32."""
        moved: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Tensors)):
                value = moved[field.name] = value.to(device, non_blocking=non_blocking)
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                moved[field.name] = value.float()
        return replace(self, **moved)  # type: ignore[type-var]

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """A copy with the given rows of every tensor."""
        parts = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, _Tensors)):
                parts[field.name] = value[rows]
        return replace(self, **parts)  # type: ignore[type-var]


@dataclass(frozen=True)
class Condition(_Tensors):
    """What a backbone reads besides z_t, which guidance drops: of noise-source baselines, and of a source that is kept
    as a condition too (`source.condition`); by default CrossFlow has none.

    Attributes:
        tokens: (B, N, D) for cross-attention, or features that the model's condition encoder turns into these.
        mask: (B, N) bool, True for a token, False for padding.
        grid: (B, C, H, W), concatenated to z_t along channels.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    grid: Tensor | None = None


@dataclass(frozen=True)
class Jump(_Tensors):
    """Where the average velocity of a flow map ends, and how it is guided.

    Attributes:
        end: (B,) float in [0, 1], the time s at which the jump from t ends; before t for a jump backwards.
        scale: (B,) float, the guidance scale w, for networks that take it as an input; 1 is no guidance.
    """

    end: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Source(_Tensors):
    """The input of sampling: the part of a batch that is known without the target. Fields as in `Batch`."""

    features: Tensor
    mask: Tensor | None = None
    condition: Condition | None = None

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Batch(_Tensors):
    """A training batch: everything the objective needs.

    >>> batch = Batch(features=torch.zeros(2, 77, 512), target=torch.zeros(2, 4, 32, 32), ids=("a", "b"))
    >>> len(batch), batch[1:].target.shape, batch.to("meta").features.device
    (2, torch.Size([1, 4, 32, 32]), device(type='meta'))

    Attributes:
        features: (B, ...), read by the source encoder.
        target: z1 (B, *latent).
        mask: (B, N) bool for token features, True for a token.
        weight: (B, ...) broadcastable to the target, 0 where the target is missing (its values there must be finite).
        condition: of backbones that read the features too (`source.condition`, noise-source baselines).
        alignment: (B, ...), compared with z0 by the encoder loss; the core does not interpret it.
        ids: a name per sample.
        unconditional: (B,) bool, the unconditional samples, whose targets `Objective.draw` has already exchanged;
            None before that.
        fraction: the share of the optimizer step's samples in this batch, in (0, 1]; below 1 if the step is divided
            among processes or accumulated parts.
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
