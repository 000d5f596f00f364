"""Starts a run from the weights of another, as the released 512 px models continue those at 256 px."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.files import read_tensors
from crossflow.core.storage import read_weights
from crossflow.core.weights import WEIGHTS, joint_run, of_task, weights_file
from crossflow.engine.folder import OBJECTIVE

ADVICE = "Start from another run."


@dataclass(frozen=True)
class Start:
    """The number of tensors copied from another run, and the names of those that keep their random initialisation."""

    num_copied: int
    initialised: tuple[str, ...]

    def describe(self, source: str) -> str:
        """A sentence for the log."""
        num = len(self.initialised)
        names = f" ({', '.join(self.initialised[:3])}{', ...' if num > 3 else ''})" if num else ""
        return f"Copied {self.num_copied} tensors from {source}; {num} keep their random initialisation{names}."


def start_from(source: str | Path, objective: nn.Module) -> Start:
    """Copies the weights of the run directory `source` into `objective` (with its `.model`), in place, where names and
    shapes agree: averaged weights if the run has them, and the learned parts of its losses.

    Raises UserError when `source` is not a run, is damaged, or shares no weight of the generator.
    """
    folder = Path(source).expanduser()
    weights = {f"model.{name}": value for name, value in _read_generator(folder).items()}
    path = (joint_run(folder) or folder) / OBJECTIVE
    if path.is_file():
        # Of these there are no averages.
        weights |= _own(read_tensors(path, ADVICE), folder)
    state = objective.state_dict()
    matching = {name for name, value in state.items() if name in weights and weights[name].shape == value.shape}
    if not any(name.startswith("model.") for name in matching):
        raise UserError(
            f"No weight of the run {folder} agrees in name and shape with this model: train.start_from needs a run of "
            "the same kind of model."
        )
    with torch.no_grad():
        for name in matching:
            state[name].copy_(weights[name])
    return Start(len(matching), tuple(name for name in state if name not in matching))


def _read_generator(folder: Path) -> dict[str, Tensor]:
    for kind in WEIGHTS:
        if (path := weights_file(folder, kind)).is_file():
            return _own(read_weights(path, ADVICE), folder)
    raise UserError(
        f"train.start_from = {folder} is not a run with weights: it has neither {' nor '.join(WEIGHTS.values())}. Give "
        "the run directory of a `crossflow train` or `crossflow convert`."
    )


def _own(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Of the tensors of a joint run those of the task in `folder`; of any other run all."""
    return tensors if joint_run(folder) is None else of_task(tensors, folder.absolute().name)
