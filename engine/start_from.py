"""A run that begins with the weights of another: the released 512 px models were trained on from those at 256 px, and a
converted released model can be trained on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError

# Averaged weights rather than those of the last step; an objective's learned parts are not averaged.
GENERATOR, HEADS = ("ema.safetensors", "model.safetensors"), ("objective.safetensors",)


@dataclass(frozen=True)
class Start:
    """What a run took over: how many tensors, and the names of those that are new or of another shape."""

    taken: int
    fresh: tuple[str, ...]

    def told(self, source: str) -> str:
        some = f": {', '.join(self.fresh[:3])}{', ...' if len(self.fresh) > 3 else ''}" if self.fresh else ""
        return f"Begins with {self.taken} tensors of {source}; {len(self.fresh)} are new{some}."


def start_from(source: str | Path, objective: nn.Module) -> Start:
    """Copies the weights of the run directory `source` into `objective` (with its `.model`), where names and shapes
    agree; in place, so on whatever device they are.

    Raises UserError when it is no run, cannot be read, or nothing of its generator agrees.
    """
    folder = Path(source).expanduser()
    found = {f"model.{name}": value for name, value in _read(folder, GENERATOR).items()} | _read(folder, HEADS)
    state = objective.state_dict()
    agreeing = {name for name, value in state.items() if name in found and found[name].shape == value.shape}
    if not any(name.startswith("model.") for name in agreeing):
        raise UserError(
            f"No weight of the run {folder} agrees in name and shape with this model: train.start_from needs a run of "
            "the same kind of model."
        )
    with torch.no_grad():
        for name in agreeing:
            state[name].copy_(found[name])
    return Start(len(agreeing), tuple(name for name in state if name not in agreeing))


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The first of the files `names` that `folder` holds; empty when it has none of the heads'."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        if names == HEADS:
            return {}
        raise UserError(
            f"train.start_from = {folder} is no run with weights: it has neither {' nor '.join(names)}. Give a run "
            "directory, of `crossflow train` or `crossflow convert`."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({error}). Start from another run.") from error
