"""Starts a run from the weights of another, as the released 512 px models continue those at 256 px."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.files import read_tensors
from crossflow.core.layers import resize_positions
from crossflow.core.weights import WEIGHTS, joint_run, of_task, weights_file
from crossflow.engine.folder import OBJECTIVE
from crossflow.networks.frozen import expect_checksum
from crossflow.networks.hub import run_folder
from crossflow.networks.run_weights import weights_of

ADVICE = "Start from another run."


@dataclass(frozen=True)
class Start:
    """The number of tensors copied from another run, and the names of those that were resized for another size of
    pictures, and of those that keep their random initialisation.
    """

    num_copied: int
    resized: tuple[str, ...]
    initialised: tuple[str, ...]

    @property
    def new(self) -> set[str]:
        """The names in the generator of parameters that the other run lacks or has in another size."""
        names = (*self.resized, *self.initialised)
        return {name.removeprefix("model.") for name in names if name.startswith("model.")}

    def describe(self, source: str) -> str:
        """A sentence for the log."""
        num = len(self.initialised)
        names = f" ({', '.join(self.initialised[:3])}{', ...' if num > 3 else ''})" if num else ""
        resized = f" Positions are resized: {', '.join(self.resized)}." if self.resized else ""
        return (
            f"Copied {self.num_copied} tensors from {source}; {num} keep their random initialisation{names}.{resized}"
        )


def start_from(source: str | Path, objective: nn.Module, checksum: str | None = None) -> Start:
    """Copies the weights of the run `source` into `objective` (with its `.model`), in place, where names and shapes
    agree: averaged weights if the run has them, and the learned parts of its losses. Learned positions of a grid of
    another size are resized.

    checksum: that the weights must have, None accepts any. Raises UserError when `source` is not a run, is damaged, has
    other weights, or shares none with the generator.
    """
    folder = Path(source).expanduser()
    folder = folder if folder.is_dir() else run_folder(source)
    if not any(weights_file(folder, kind).is_file() for kind in WEIGHTS):
        raise UserError(
            f"train.start_from = {folder} is not a run with weights: it has neither {' nor '.join(WEIGHTS.values())}. "
            "Give the run directory of a `crossflow train` or `crossflow convert`."
        )
    stored = weights_of(folder)
    if checksum is not None:
        expect_checksum(str(source), stored.checksum, checksum)
    weights = {f"model.{name}": value for name, value in stored.state.items()}
    path = (joint_run(folder) or folder) / OBJECTIVE
    if path.is_file():
        # Of these there are no averages.
        weights |= _own(read_tensors(path, ADVICE), folder)
    state = objective.state_dict()
    candidates = {name: _resized(objective, name, weights[name]) for name in state if name in weights}
    resized = {name: value for name, value in candidates.items() if value is not None}
    weights |= resized
    matching = {name for name, value in state.items() if name in weights and weights[name].shape == value.shape}
    if not any(name.startswith("model.") for name in matching):
        raise UserError(
            f"No weight of the run {folder} agrees in name and shape with this model: train.start_from needs a run of "
            "the same kind of model."
        )
    with torch.no_grad():
        for name in matching:
            state[name].copy_(weights[name])
    rest = tuple(name for name, _ in objective.named_parameters() if name not in matching)
    return Start(len(matching) - len(resized), tuple(resized), rest)


def _own(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Of the tensors of a joint run those of the task in `folder`; of any other run all."""
    return tensors if joint_run(folder) is None else of_task(tensors, folder.absolute().name)


def _resized(objective: nn.Module, name: str, value: Tensor) -> Tensor | None:
    """The learned positions `name` of a grid of another size, for that of `objective`; None for all other tensors."""
    owner, _, leaf = name.rpartition(".")
    module = objective.get_submodule(owner)
    grid, present = getattr(module, "grids", {}).get(leaf), getattr(module, leaf)
    if grid is None or value.ndim != 2 or value.shape == present.shape or value.shape[1] != present.shape[1]:
        return None
    return resize_positions(value, grid)
