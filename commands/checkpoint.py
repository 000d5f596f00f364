"""The options of commands that use a trained model: which one, how it is sampled, where results go."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crossflow.commands import options
from crossflow.commands.console import is_first_process, join_processes, say
from crossflow.core.errors import UserError
from crossflow.core.output import check_output, planned

if TYPE_CHECKING:
    from crossflow.engine.sample import Pipeline

Command = Callable[..., None]


@dataclass(frozen=True)
class Model:
    """A trained model with the options of the command line; it is loaded when `pipe` is first used."""

    checkpoint: str
    task: str | None
    """Of a joint run."""
    weights: str | None
    device: str | None
    precision: str | None
    batch: int | None
    compile: bool
    offload: bool
    replaced: Sequence[str]
    """Settings of the run that --set replaces, as KEY=VALUE."""
    seed: int
    solver: str | None
    steps: int | None
    guidance: float | None
    guide_with: str | None
    adapter_scale: float | None
    output: Path | None
    overwrite: bool
    open_result: bool
    overrides: Sequence[str]
    """Further fields of SampleConfig, as KEY=VALUE."""

    @functools.cached_property
    def pipe(self) -> "Pipeline":
        """The loaded model. Raises UserError for settings that do not exist or are out of range."""
        from crossflow.engine.sample import load

        where: dict[str, Any] = {
            "device": self.device,
            "precision": self.precision,
            "compile": self.compile,
            "offload": self.offload,
        }
        own: dict[str, Any] = {"weights": self.weights, "adapter_scale": self.adapter_scale, "batch_size": self.batch}
        pipe = load(self.place, overrides=self.replaced, **own, **where)
        pipe.sample_settings(**self.settings)
        if self.guide_with is not None:
            pipe.guide_with(load(self.guide_with, overrides=self.replaced, **where))
        return pipe

    @functools.cached_property
    def place(self) -> Path:
        """The run directory, or the folder of the task in a joint one. Raises UserError if it has no such task, or
        several and none is named.
        """
        from crossflow.engine.joint.pipeline import member, task_for
        from crossflow.networks.hub import run_folder
        from crossflow.tasks import load_config

        folder = run_folder(self.checkpoint)
        if self.choices:
            return member(folder, self.task or task_for(folder))
        if self.task is not None and self.task != (own := load_config(folder).task):
            raise UserError(f"{self.checkpoint} is a run of the task {own}, not of {self.task}.")
        return folder

    @functools.cached_property
    def choices(self) -> tuple[str, ...]:
        """The tasks of a joint run; none for any other."""
        from crossflow.engine.joint.pipeline import joint_tasks
        from crossflow.networks.hub import run_folder

        return joint_tasks(run_folder(self.checkpoint))

    def taking(self, kind: str) -> "Model":
        """The model whose task takes such inputs (text | image), where a joint run has one and none is named."""
        from crossflow.engine.joint.pipeline import task_for
        from crossflow.networks.hub import run_folder

        if self.task is not None or not self.choices:
            return self
        return dataclasses.replace(self, task=task_for(run_folder(self.checkpoint), kind))

    def of_task(self, name: str) -> "Model":
        """The model of this task, where a joint run has it and none is named."""
        return dataclasses.replace(self, task=name) if self.task is None and name in self.choices else self

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The fields of SampleConfig set on the command line."""
        from crossflow.core.settings import parse_overrides

        parsed = parse_overrides(self.overrides)
        if isinstance(section := parsed.get("sample"), Mapping):
            words = [f"--{name} VALUE" if name in OWN_OPTION else f"{name}=VALUE" for name in section]
            raise UserError(f"Settings of sampling are given without `sample.`: write {' '.join(words)}.")
        options = {name: getattr(self, name) for name in OWN_OPTION}
        return parsed | {name: value for name, value in options.items() if value is not None}

    def planned(self, default: Path) -> Path:
        """The folder that results will go to; default: without --output."""
        return planned(default, self.output, overwrite=self.overwrite)

    def announce(self, folder: Path, **overrides: object) -> None:
        """Loads the model and prints what is used, and the folder that results go to.

        overrides: settings of sampling in place of the command line's.
        """
        pipe, settings = self.pipe, self.pipe.sample_settings(**(self.settings | overrides))
        if is_first_process():
            guide = f" by {pipe.guided_by}" if pipe.guided_by is not None else ""
            adapter = f", adapter at {pipe.adapter_scale:g}" if pipe.adapters else ""
            say(
                f"Using {self.checkpoint} ({pipe.task.name}, {pipe.weights} weights{adapter}) on {pipe.device} in "
                f"{pipe.precision}: {settings.solver}, {settings.steps} steps, guidance {settings.guidance:g}{guide}."
            )
            say(f"Results go to {folder}.")

    def metadata(self, **details: object) -> dict[str, str]:
        """How a result was made, as text for the metadata of its files; details: more about this result."""
        settings = self.pipe.sample_settings(**self.settings).model_dump(mode="json")
        values: dict[str, Any] = {"seed": self.seed, "checkpoint": self.checkpoint, "weights": self.pipe.weights}
        values |= {"settings": settings}
        values |= {"adapter_scale": self.adapter_scale} if self.adapter_scale is not None else {}
        values |= {"guided_by": self.pipe.guided_by} if self.pipe.guided_by is not None else {}
        return {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in (values | details).items()
        }


OWN_OPTION = ("solver", "steps", "guidance")
"""Fields of SampleConfig that are options."""

OPTIONS = (
    click.option("--checkpoint", required=True, help="Run directory, zoo:NAME, or hub id (owner/name)."),
    click.option("--task", type=options.TaskName(), help="Of a joint run. Default: the only one that fits."),
    click.option("--weights", type=options.Choice(["ema", "model"]), help="Default: the averaged ones (ema)."),
    *options.COMPUTING,
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0),
        help="Noise depends on the seed and the item alone.",
    ),
    click.option("--solver", help="ODE solver (crossflow list solvers). Default: the recipe's."),
    click.option("--steps", type=click.IntRange(1), help="Solver steps. Default: the recipe's."),
    click.option("--guidance", type=float, help="Guidance scale; 1 turns guidance off. Default: the recipe's."),
    click.option("--guide-with", metavar="DIR", help="Autoguidance: run directory of a weaker version of the model."),
    click.option("--adapter-scale", type=float, help="Strength of a fine-tuned run's adapter: 0 base, 1 as trained."),
    click.option(
        "--set",
        "replaced",
        multiple=True,
        metavar="KEY=VALUE",
        help="Replace a setting of the run, such as text.encoder=FOLDER or codec.source=FOLDER; repeatable.",
    ),
)


def _say_peak_memory() -> None:
    """Prints the peak memory of a GPU, if one was used."""
    if "torch" not in sys.modules:
        return
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks = [torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())]
        say(f"Peak memory on the GPU: {max(peaks) / 2**30:.2f} GiB.")


def uses_model(default_output: str, *, shared: bool = False) -> Callable[[Command], Command]:
    """Gives a command the options of a trained model and its output, and calls it with a `Model` in front.

    default_output: how the help names the folder that is used without --output; shared: whether the processes of a
    launcher share the command's items; otherwise all but the first return at once.
    """

    def decorate(function: Command) -> Command:
        fields = [field.name for field in dataclasses.fields(Model)]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            model = Model(**{name: values.pop(name) for name in fields})
            if not shared:
                join_processes()  # before the others return, since loading a model waits for them
                if not is_first_process():
                    return
                check_output(model.output, overwrite=model.overwrite)
            function(model, **values)
            _say_peak_memory()

        decorated: Command = run
        output = options.output_folder(default_output)
        for option in reversed((*OPTIONS, output, options.overwrite, options.open_result, options.settings)):
            decorated = option(decorated)
        return decorated

    return decorate
