"""Several tasks learned as one: models whose backbones share a body, and the objective over all of them.

Each task keeps its source encoder, the first and last layer of its backbone with its own patches and positions, and its
indicator, which tells the shared blocks which task they work for. The gradients of all tasks come from one forward
pass, so each step trains every parameter. B samples of a task in a batch, K tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossflow.core.batch import Batch, map_tensors
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.noise import Noise
from crossflow.core.objective import Objective
from crossflow.core.weights import SHARED


@dataclass(frozen=True)
class JointBatch:
    """The batches of the tasks by name, B samples each."""

    members: Mapping[str, Batch]

    def __len__(self) -> int:
        return sum(map(len, self.members.values()))

    def to(self, device: torch.device | str) -> "JointBatch":
        """All batches on `device`."""
        return JointBatch({name: batch.to(device) for name, batch in self.members.items()})

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of all samples."""
        return tuple(id for batch in self.members.values() for id in batch.ids)

    @property
    def unconditional(self) -> Tensor | None:
        """(K B,) bool, the unconditional samples; None before they are drawn."""
        flags = [batch.unconditional for batch in self.members.values() if batch.unconditional is not None]
        return torch.cat(flags) if flags else None


@dataclass(frozen=True)
class JointNoise:
    """The noise of the tasks by name."""

    members: Mapping[str, Noise]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "JointNoise":
        """All parts on `device`."""
        return map_tensors(lambda part: part.to(device, non_blocking=non_blocking), self)


def share_body(models: Mapping[str, CrossFlow]) -> nn.ModuleDict:
    """Gives the backbones of all models the body of the first one, which is returned: part -> module.

    Raises UserError for a backbone that cannot be shared, and for bodies of other shapes.
    """
    first, *others = models
    backbone = models[first].backbone
    parts: tuple[str, ...] = getattr(backbone, "body", ())
    if not parts:
        raise UserError(
            f"The backbone of {first} ({type(backbone).__name__}) has no body that tasks could share. Joint training "
            "takes backbone.name=dit, and no run that is used backwards."
        )
    shared = nn.ModuleDict({part: getattr(backbone, part) for part in parts})
    expected = _shapes(shared)
    for name in others:
        own = models[name].backbone
        shapes = _shapes(nn.ModuleDict({part: getattr(own, part) for part in parts if hasattr(own, part)}))
        if different := sorted(shapes.items() ^ expected.items()):
            raise UserError(
                f"The tasks {first} and {name} cannot share a backbone: {different[0][0]} differs. Give all tasks one "
                "backbone.size and backbone.conv, and no cross-attention to some of them alone (source.kind=gaussian, "
                "source.condition)."
            )
        for part in parts:
            setattr(own, part, shared[part])
    return shared


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


class JointModel(nn.Module):
    """The models of several tasks around one body. Its state has the body once, under `shared`, and what each task has
    of its own under `tasks.NAME`.

    >>> from crossflow.core.backbones import build_backbone
    >>> from crossflow.core.config import BackboneConfig
    >>> from crossflow.core.source import SourceEncoder
    >>> backbones = [build_backbone(BackboneConfig(), shape) for shape in ((4, 8, 8), (1, 4, 4))]
    >>> one, two = (CrossFlow(SourceEncoder(None, "gaussian", ()), backbone) for backbone in backbones)
    >>> model = JointModel({"a": one, "b": two})
    >>> one.backbone.blocks is two.backbone.blocks, sorted(model.num_parameters())
    (True, ['a', 'b', 'shared'])
    """

    def __init__(self, models: Mapping[str, CrossFlow]) -> None:
        super().__init__()
        self.shared = share_body(models)
        for model in models.values():
            for part, module in self.shared.items():
                del model.backbone._modules[part]
                model.backbone.__dict__[part] = module  # used, but not a submodule: it is saved once
        self.tasks = nn.ModuleDict(models)

    def num_parameters(self) -> dict[str, int]:
        """Number of parameters of the shared body, and of what each task has of its own."""
        parts = {SHARED: self.shared, **dict(self.tasks.items())}
        return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


class JointObjective(nn.Module):
    """The losses of all tasks by `TASK/NAME`, and "loss", the mean of the tasks' losses under `weights` (default 1).

    objectives: those of the tasks, whose models come to share a body; see `JointModel`.
    """

    def __init__(self, objectives: Mapping[str, Objective], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model = JointModel({name: objective.model for name, objective in objectives.items()})
        for objective in objectives.values():
            model = objective.model
            del objective._modules["model"]
            objective.__dict__["model"] = model  # used, but not a submodule: it is that of `self.model`
        self.tasks = nn.ModuleDict(objectives)
        total = sum(weights.get(name, 1.0) for name in objectives)
        self.shares = {name: weights.get(name, 1.0) / total for name in objectives}
        """Share of each task in the loss."""

    @property
    def companions(self) -> tuple[nn.Module, ...]:
        """Those of all tasks, see `Objective.companions`."""
        return tuple(part for objective in self._objectives().values() for part in objective.companions)

    @property
    def leaves_parameters_out(self) -> bool:
        """Whether some trainable parameters get no gradient."""
        return any(objective.leaves_parameters_out for objective in self._objectives().values())

    def _objectives(self) -> dict[str, Objective]:
        return dict(self.tasks.items())  # type: ignore[arg-type]

    def draw(self, batches: Sequence[JointBatch], noises: Sequence[JointNoise]) -> list[JointBatch]:
        """The batches with the unconditional samples of each task drawn, see `Objective.draw`."""
        drawn = {
            name: objective.draw([batch.members[name] for batch in batches], [noise.members[name] for noise in noises])
            for name, objective in self._objectives().items()
        }
        return [JointBatch({name: parts[number] for name, parts in drawn.items()}) for number in range(len(batches))]

    def forward(self, batch: JointBatch, noise: JointNoise) -> dict[str, Tensor]:
        """The losses of a batch by name, scalars."""
        losses: dict[str, Tensor] = {}
        for name, objective in self._objectives().items():
            parts = objective(batch.members[name], noise.members[name])
            losses |= {f"{name}/{part}": value for part, value in parts.items()}
        total = torch.stack([self.shares[name] * losses[f"{name}/loss"] for name in self.tasks]).sum()
        return {"loss": total, **losses}
