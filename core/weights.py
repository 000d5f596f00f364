"""The weights of a model in a run directory: their files, and strict loading."""

from collections.abc import Callable
from pathlib import Path

import torch

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.files import read_tensors
from crossflow.core.model import CrossFlow

WEIGHTS = {"ema": "ema.safetensors", "model": "model.safetensors"}
"""Kind of weights -> their file; `ema` is the moving average."""


def kind_of_weights(folder: Path, kind: str | None = None) -> str:
    """`kind`, or by default ema if the run directory has it, else model. Raises UserError for an unknown kind."""
    if kind is not None and kind not in WEIGHTS:
        raise unknown_name("weights", kind, WEIGHTS)
    return kind or ("ema" if (folder / WEIGHTS["ema"]).is_file() else "model")


def load_weights(build: Callable[[], CrossFlow], path: Path) -> CrossFlow:
    """The model that `build` makes, with the weights of a file, which is mapped into memory instead of copied.

    Raises UserError unless the file holds exactly the model's tensors.
    """
    with torch.device("meta"):
        model = build()
    _assign(model, path)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        model = build()  # it has tables that are computed instead of saved
        _assign(model, path)
    return model


def _assign(model: CrossFlow, path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no {path.name}: the run has not saved weights yet, or the file was removed."
        )
    state = read_tensors(path, "Use another checkpoint of the run.")
    expected = model.state_dict()
    wrong = [
        *(f"{key} is missing" for key in expected if key not in state),
        *(f"{key} is not part of this model" for key in state if key not in expected),
        *(
            f"{key} has shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{path} does not fit the model of its config.yaml: {'; '.join(wrong[:5])}{more}.")
    model.load_state_dict({key: tensor.to(expected[key].dtype) for key, tensor in state.items()}, assign=True)
