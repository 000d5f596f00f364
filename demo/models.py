"""The loaded models of the page, each under a name that says nothing about the server's folders."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.sampling import count_evaluations
from crossflow.core.solvers import SOLVERS
from crossflow.data.images import save_png
from crossflow.engine.sample import Pipeline

NUM_EXAMPLES = 6
EXAMPLES = "scenes"
"""The embedded data that examples are taken from: those of a run may be private."""


@dataclass(frozen=True)
class Model:
    """A loaded pipeline with its name on the page."""

    name: str
    pipe: Pipeline
    makes: str
    """text | picture | metres (a depth map)."""

    @property
    def task(self) -> str:
        """The name of its task."""
        return self.pipe.task.name

    @property
    def title(self) -> str:
        """Its task in words, such as `Text to image`."""
        return (self.pipe.task.hub_tag or self.task).replace("-", " ").capitalize()

    @property
    def takes_text(self) -> bool:
        """Whether its input is a prompt; otherwise it is a picture."""
        return self.pipe.task.input_kind == "text"

    @property
    def is_small(self) -> bool:
        """Whether its pictures are so small that they are shown as squares of colour."""
        return self.pipe.task.config.data.image_size <= 96

    @property
    def facts(self) -> str:
        """Size and sampling settings in a line."""
        settings = self.pipe.settings
        number = sum(parameter.numel() for parameter in self.pipe.model.parameters())
        size = f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"
        cost = count_evaluations(**settings.model_dump(exclude={"mode", "batch_size"}))
        evaluations = "" if cost is None else f" ({cost} network evaluations)"
        return f"{self.name}: {size} parameters, {settings.steps} steps of {settings.solver}{evaluations}."

    @property
    def solvers(self) -> list[str]:
        """Names of the solvers that can be chosen: adaptive ones take steps without bound."""
        schemes = [SOLVERS.get(name) for name in SOLVERS.names()]
        return [each.name for each in schemes if not each.adaptive and (not each.jumps or self.pipe.model.jumps)]


@dataclass(frozen=True)
class Models:
    """The models in the order in which they were named."""

    all: tuple[Model, ...] = ()

    @property
    def by_task(self) -> dict[str, list[Model]]:
        """Task -> its models."""
        groups: dict[str, list[Model]] = {}
        for model in self.all:
            groups.setdefault(model.task, []).append(model)
        return groups

    @property
    def names(self) -> list[str]:
        """All names."""
        return [model.name for model in self.all]

    def get(self, name: object) -> Model:
        """The model of a name. Raises UserError with near names for an unknown one."""
        for model in self.all:
            if model.name == name:
                return model
        raise unknown_name("model", str(name)[:60], self.names)

    def of_folder(self, folder: Path) -> Model | None:
        """The model that was loaded from a run directory."""
        for model in self.all:
            if model.pipe.folder is not None and model.pipe.folder.resolve() == folder.resolve():
                return model
        return None


def open_models(checkpoints: Sequence[str], load: Callable[[str], Pipeline]) -> Models:
    """Loads the models and lets each make a first output, so that visitors do not wait for what is made once."""
    models: list[Model] = []
    for checkpoint in checkpoints:
        stem = Path(checkpoint.rpartition(":")[2]).name or "model"
        names = (stem, *(f"{stem} ({number})" for number in range(2, len(checkpoints) + 1)))
        used = {model.name for model in models}
        pipe = load(checkpoint)
        models.append(Model(next(name for name in names if name not in used), pipe, _makes(pipe)))
    return Models(tuple(models))


def _makes(pipe: Pipeline) -> str:
    value: Any = "a" if pipe.task.input_kind == "text" else np.full((64, 64, 3), 128, np.uint8)
    (output,) = pipe(value, steps=1).raw
    if isinstance(output, str):
        return "text"
    return "picture" if output.ndim == 3 else "metres"


def examples(model: Model, folder: Path) -> list[str]:
    """Prompts, or paths of pictures written to `folder`; none for a task that cannot read the embedded data."""
    pipe = model.pipe
    try:
        open_data = functools.partial(pipe.dataset, seed=0)
        cases = pipe.task.scoring().open_cases(open_data, EXAMPLES, "test", NUM_EXAMPLES).all()
    except UserError:
        return []
    if model.takes_text:
        return list(dict.fromkeys(case.input for case in cases))
    return [str(save_png(case.input, folder / f"{model.task}-{number}.png")) for number, case in enumerate(cases)]


def metadata(model: Model, details: Mapping[str, object]) -> dict[str, str]:
    """Text entries of a picture's file: how to make it again."""
    return {"model": model.name, **{name: str(value) for name, value in details.items()}}
