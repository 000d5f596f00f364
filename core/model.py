"""CrossFlow = source encoder + flow backbone (+ a condition encoder for the noise-source baseline)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from crossflow.core.adapters import Adapters
from crossflow.core.batch import Condition, Jump
from crossflow.core.source import SourceEncoder


class CrossFlow(nn.Module):
    """A noise-free flow model: z0 from `source_encoder`, velocities from `backbone`. B batch.

    condition_encoder: module (features, mask) -> (B, N, D), from features to a baseline's condition tokens; None if the
    tokens need no encoder, or without a condition.

    >>> from crossflow.core.backbones import build_backbone
    >>> from crossflow.core.config import BackboneConfig
    >>> from crossflow.core.sampling import generate
    >>> trunk = lambda features, mask: features.reshape(-1, 2, 4, 8, 8)
    >>> backbone = build_backbone(BackboneConfig(size="tiny"), (4, 8, 8))
    >>> model = CrossFlow(SourceEncoder(trunk, "variational", (4, 8, 8)), backbone)
    >>> z0 = model.source_encoder(torch.randn(3, 512)).sample()
    >>> generate(model, z0, solver="heun", steps=2, guidance=2.0).shape
    torch.Size([3, 4, 8, 8])
    """

    def __init__(
        self, source_encoder: SourceEncoder, backbone: nn.Module, condition_encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.source_encoder = source_encoder
        self.backbone = backbone
        self.condition_encoder = condition_encoder
        self.borrowed: frozenset[str] = frozenset()
        """Names of the tensors that belong to the base of a fine-tuned run: they are neither trained nor stored."""
        self.adapters: Adapters | None = None
        """How the weights come about, if they were loaded from fine-tuned runs."""
        self._objective: tuple[nn.Module, ...] = ()

    @property
    def objective(self) -> nn.Module | None:
        """The training objective with its learned heads, if it was loaded along with the model. It is not a submodule,
        so it is not moved, saved or counted with the model.
        """
        return self._objective[0] if self._objective else None

    def remember_objective(self, objective: nn.Module) -> None:
        """Sets `objective`, which trains this model (in a tuple, so that it does not become a submodule)."""
        self._objective = (objective,)

    def encode_condition(self, condition: Condition | None) -> Condition | None:
        """The condition as the backbone reads it; called once per batch, before any velocity."""
        if condition is None or self.condition_encoder is None or condition.tokens is None:
            return condition
        return replace(condition, tokens=self.condition_encoder(condition.tokens, condition.mask))

    @property
    def jumps(self) -> bool:
        """Whether this is a flow map, whose velocities take a `Jump`."""
        return getattr(self.backbone, "jumps", False)

    @property
    def takes_scale(self) -> bool:
        """Whether the guidance scale of a jump is an input of the network."""
        return getattr(self.backbone, "takes_scale", False)

    def velocities(
        self,
        z_t: Tensor,
        t: Tensor,
        unconditional: Tensor,
        condition: Condition | None = None,
        jump: Jump | None = None,
    ) -> list[Tensor]:
        """Velocities, coarse to fine: z_t (B, *latent), t (B,) float in [0, 1], unconditional (B,) bool.

        jump: of a flow map, for the average velocities from t to its end; None for those at t.
        """
        if jump is None:
            return self.backbone(z_t, t, unconditional, condition)
        return self.backbone(z_t, t, unconditional, condition, jump)

    def velocity(
        self,
        z_t: Tensor,
        t: Tensor,
        unconditional: Tensor,
        condition: Condition | None = None,
        jump: Jump | None = None,
    ) -> Tensor:
        """The velocity at full resolution, (B, *latent), in the dtype of z_t: guidance amplifies rounding errors."""
        extra = () if jump is None else (jump,)
        return self.backbone(z_t, t, unconditional, condition, *extra)[-1].to(z_t.dtype)

    def num_parameters(self) -> dict[str, int]:
        """Number of parameters of the flow network and of each encoder."""
        counts = {"flow": _count(self.backbone), "source encoder": _count(self.source_encoder)}
        if self.condition_encoder is not None:
            counts["condition encoder"] = _count(self.condition_encoder)
        return counts


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def as_times(t: float, like: Tensor) -> Tensor:
    """(B,) float32, all `t`, on the device of `like` (B, ...)."""
    return torch.full((len(like),), t, dtype=torch.float32, device=like.device)


def as_flags(value: bool, like: Tensor) -> Tensor:
    """(B,) bool, all `value`, on the device of `like` (B, ...)."""
    return torch.full((len(like),), value, dtype=torch.bool, device=like.device)
