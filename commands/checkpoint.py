"""The options of commands that use a trained model."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from crossflow.engine.sample import Pipeline


Command = Callable[..., None]


@dataclass(frozen=True)
class Use:
    """A trained model as a command was told to use it."""

    checkpoint: str
    pipe: "Pipeline"
    settings: dict[str, Any]
    """Fields of SampleConfig that were given."""
    seed: int
    output: Path | None
    moved: Sequence[str] = ()
    """Settings of the run that were replaced by --set."""

    def metadata(self, **more: Any) -> dict[str, str]:
        """What every file that is written says of how it was made; all of it text."""
        settings = self.pipe.sample_settings(**self.settings).model_dump(mode="json")
        made: dict[str, Any] = {
            "seed": self.seed,
            "checkpoint": self.checkpoint,
            "weights": self.pipe.weights,
            "settings": settings,
        }
        made |= {"guided_by": self.pipe.guided_by} if self.pipe.guided_by is not None else {}
        return {name: one if isinstance(one, str) else json.dumps(one) for name, one in (made | more).items()}


OPTIONS = (
    click.option("--checkpoint", required=True, help="A run directory, or a hub id."),
    click.option("--weights", type=click.Choice(["ema", "model"]), help="Default: the averaged ones (ema)."),
    click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one."),
    click.option("--seed", default=0, show_default=True, help="The noise follows from it and the item alone."),
    click.option("--solver", help="crossflow list solvers."),
    click.option("--steps", type=int, help="Solver steps."),
    click.option("--guidance", type=float, help="Guidance scale; 1: none."),
    click.option("--guide-with", help="Run directory of a weaker version of the model: autoguidance."),
    click.option(
        "--set",
        "moved",
        multiple=True,
        metavar="KEY=VALUE",
        help="Replace a setting of the run, such as text.encoder=FOLDER or codec.source=FOLDER.",
    ),
    click.option("--output", type=click.Path(path_type=Path), help="Folder to write to."),
    click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
)


def uses_checkpoint(*, shared: bool = False) -> Callable[[Command], Command]:
    """Gives a command the options of a checkpoint and its solver, and calls it with a `Use` in front.

    shared: whether the processes of a launcher share the command's items; otherwise only the first one works.
    """

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def run(
            checkpoint: str, weights: str | None, device: str | None, seed: int, output: Path | None, **others: Any
        ) -> None:
            from crossflow.core import distributed
            from crossflow.core.settings import parse_overrides
            from crossflow.engine.sample import load

            if distributed.announced():
                distributed.device()  # joins the processes of a launcher
                if not distributed.is_main() and not shared:
                    return
            settings = parse_overrides(others.pop("overrides"))
            asked = {name: others.pop(name) for name in ("solver", "steps", "guidance")}
            settings |= {name: value for name, value in asked.items() if value is not None}
            moved = others.pop("moved")
            pipe = load(checkpoint, weights=weights, device=device, overrides=moved)
            pipe.sample_settings(**settings)  # tells what is wrong with them before any work
            guide = others.pop("guide_with")
            if guide is not None:
                pipe.guide_with(load(guide, device=device, overrides=moved))
            function(Use(checkpoint, pipe, settings, seed, output, moved), **others)

        decorated: Command = run
        for option in reversed(OPTIONS):
            decorated = option(decorated)
        return decorated

    return decorate
