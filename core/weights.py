"""The weights of a model in a run directory: their files, and strict loading."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.model import CrossFlow
from crossflow.core.storage import read_weights

T = TypeVar("T")

WEIGHTS = {"ema": "ema.safetensors", "model": "model.safetensors"}
"""Kind of weights -> their file; `ema` is the moving average."""
MEMBERS, SHARED = "tasks", "shared"
"""A joint run keeps the part of each task in its folder tasks/NAME, and its weights under the names tasks.NAME; those
of the body, which all tasks share, under `shared`.
"""

BACKWARDS = "backwards"
"""Where a joint run keeps the tasks that run the flow of another backwards: complete runs of their own."""


def joint_run(folder: Path) -> Path | None:
    """The joint run that `folder` is a task of, RUN of RUN/tasks/NAME, which holds its weights, log and checkpoints;
    None for a run of its own.
    """
    place = folder.absolute()
    root = place.parent.parent
    is_member = place.parent.name == MEMBERS and (root / "config.yaml").is_file()
    return None if not is_member or any((folder / name).is_file() for name in WEIGHTS.values()) else root


def weights_file(folder: Path, kind: str) -> Path:
    """The file with the weights of a run directory, or of a task of a joint run."""
    return (joint_run(folder) or folder) / WEIGHTS[kind]


def of_task(tensors: Mapping[str, T], name: str, body: str = "backbone") -> dict[str, T]:
    """Of the tensors of a joint run those of one task, by their names in a run of its own."""
    own, shared = f"{MEMBERS}.{name}.", f"{SHARED}."
    return {
        f"{body}.{key.removeprefix(shared)}" if key.startswith(shared) else key.removeprefix(own): tensor
        for key, tensor in tensors.items()
        if key.startswith((own, shared))
    }


def kind_of_weights(folder: Path, kind: str | None = None) -> str:
    """`kind`, or by default ema if the run directory has it, else model. Raises UserError for an unknown kind."""
    if kind is not None and kind not in WEIGHTS:
        raise unknown_name("weights", kind, WEIGHTS)
    return kind or ("ema" if weights_file(folder, "ema").is_file() else "model")


def load_weights(
    build: Callable[[], CrossFlow],
    state: Mapping[str, Tensor],
    origin: Path,
    base: Mapping[str, Tensor] | None = None,
) -> CrossFlow:
    """The model that `build` makes, with the weights `state`, which become its own.

    origin: their file, for the message. base: weights of the run it was fine-tuned from, which supply what `state`
    lacks where their shapes fit. Raises UserError unless they are exactly the model's tensors.
    """
    with uninitialized():
        model = build()
    if base is not None:
        expected, computed = model.state_dict(), dict(model.named_buffers())
        fitting = {name: tensor for name, tensor in base.items() if _shape(expected.get(name)) == tensor.shape}
        state = {**{name: value for name, value in computed.items() if name in expected}, **fitting, **state}
    _assign(model, state, origin)
    return model


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def read_state(folder: Path, kind: str) -> dict[str, Tensor]:
    """The weights of a run directory, or of a task of a joint run, mapped into memory. Raises UserError without a good
    file.
    """
    path = weights_file(folder, kind)
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no {path.name}: the run has not saved weights yet, or the file was removed."
        )
    state = read_weights(path, "Use another checkpoint of the run.")
    return state if joint_run(folder) is None else of_task(state, folder.absolute().name)


@contextmanager
def uninitialized() -> Iterator[None]:
    """Context in which the parameters of new networks are not initialised, since they are replaced afterwards.

    Their memory is reserved but never touched. (The device `meta` would take none, but needs seconds to import torch's
    compiler, and leaves no tables that are computed rather than saved.)

    >>> with uninitialized():
    ...     layer = nn.Linear(3, 4)
    """
    with _NoInitialization():
        yield


@contextmanager
def shapes_only() -> Iterator[None]:
    """Context in which new networks are shapes without memory, for counting, planning and comparing: parameters and
    buffers are on the device `meta`. (Torch would trace each initialisation, half the time of building a network.)

    >>> with shapes_only():
    ...     layer = nn.Linear(3, 4)
    >>> layer.weight.is_meta
    True
    """
    with torch.device("meta"), uninitialized():
        yield


class _NoInitialization(TorchFunctionMode):
    """Leaves out what `torch.nn.init` does to parameters; buffers are filled."""

    # Both, since some functions of torch.nn.init hide the method that they call.
    _FILLS = frozenset(
        [getattr(nn.init, f"{name}_") for name in ("normal", "uniform", "constant", "kaiming_uniform")]
        + [getattr(Tensor, f"{name}_") for name in ("normal", "uniform", "fill", "zero")]
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)


def _assign(model: CrossFlow, state: Mapping[str, Tensor], origin: Path) -> None:
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
        raise UserError(f"{origin} does not fit the model of its config.yaml: {'; '.join(wrong[:5])}{more}.")
    model.load_state_dict({key: tensor.to(expected[key].dtype) for key, tensor in state.items()}, assign=True)
