"""``crossflow train``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from crossflow.commands.console import say, show_scores, training_progress
from crossflow.commands.options import TaskName
from crossflow.core.errors import UserError
from crossflow.tasks import task_names


@click.command("train")
@click.option("--task", type=TaskName(), help="What to train; needed unless --config says it.")
@click.option(
    "--config", "recipe", help="A shipped recipe (crossflow list configs) or a YAML file. Default: TASK_tiny."
)
@click.option(
    "--data", help="Training data: scenes, coco:DIR, jsonl:FILE, folder:DIR, pairs:DIR, ... (crossflow list datasets)."
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Run directory. Default: runs/RECIPE, numbered if taken."
)
@click.option("--resume", help="auto: the newest good checkpoint of --output; or a checkpoint's folder.")
@click.option("--data-changed", is_flag=True, help="Resume although the training data are not what they were.")
@click.option(
    "--dry-run", is_flag=True, help="Say parameters, memory, time and disk of the flow's training; nothing is kept."
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def command(
    task: str | None,
    recipe: str | None,
    data: str | None,
    output: Path | None,
    resume: str | None,
    data_changed: bool,
    dry_run: bool,
    overrides: Sequence[str],
) -> None:
    """Train a model; KEY=VALUE overrides any setting of the recipe.

    \b
      crossflow train --task sr train.steps=2000 sr.scale=2
      crossflow train --task t2i --data coco:~/flickr8k --output runs/mine
      crossflow train --task t2i --output runs/mine --resume auto
      crossflow train --task depth source.kind=gaussian      the noise-source baseline
      accelerate launch -m crossflow train --task t2i        on many GPUs

    Ctrl-C ends cleanly with a checkpoint. The run directory holds config, weights, samples, metrics and checkpoints.
    """
    from crossflow.core import distributed
    from crossflow.engine.folder import new_folder
    from crossflow.engine.train import Run, finished
    from crossflow.engine.train import dry_run as measure
    from crossflow.tasks.base import load_config, task_class

    distributed.device()  # joins the processes of a launcher, if there are several
    resumed = (
        output
        if resume is not None and recipe is None and output is not None and (output / "config.yaml").exists()
        else None
    )
    if task is None and recipe is None and resumed is None:
        raise UserError(
            f"Say what to train: --task {'|'.join(task_names())}, or --config with a recipe (crossflow list configs)."
        )
    name = recipe or f"{task}_tiny"
    given = ([f"data.train={data}"] if data is not None else []) + list(overrides)
    config = load_config(resumed or name, given, task)
    if resume is not None and output is None:
        raise UserError("--resume continues the run in --output; say which directory that is.")
    progress = training_progress()
    if dry_run:
        config = load_config(resumed or name, [*given, *task_class(config.task).quick], task)
        report = measure(config, progress=progress)
        if distributed.is_main():
            _show_dry_run(report)
        return
    # With several processes each must name the same new folder: only the first may look what is taken.
    folder = output or Path(distributed.on_main(lambda: str(new_folder(Path("runs"), Path(name).stem))))
    if resume is not None and (outcome := finished(config, folder)) is not None:
        if distributed.is_main():
            say(f"The run in {folder} is finished: {outcome.result.step} of {config.train.steps} steps, and scored.")
            say("Train it further with train.steps=N.")
        return
    run = Run.open(config, folder, resume=resume, data_changed=data_changed, progress=progress)
    if distributed.is_main():
        parts = ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in run.model.num_parameters().items())
        say(f"Training {config.task} into {folder} ({parts}; {config.train.steps} steps of {config.train.batch_size}).")
    outcome = run.train()
    if not distributed.is_main():
        return
    result = outcome.result
    if result.status == "stopped":
        say(
            f"Stopped after step {result.step} ({result.reason}); continue with: "
            f"crossflow train --output {folder} --resume auto"
        )
        return
    say(f"Trained {result.step} steps in {result.seconds / 60:.1f} minutes. Samples: {folder / 'samples'}")
    if outcome.scores is not None:
        show_scores(outcome.scores.values, outcome.scores.intervals, outcome.baseline, run.task.headline)
        for note in outcome.scores.notes:
            say(f"note: {note}")
    prompt = '"a red cube"' if run.config.data.train == "scenes" else "TEXT"
    given_input = f"--prompt {prompt}" if run.task.input_kind == "text" else "--input PICTURE"
    say(f"The run is in {folder}. Use it: crossflow sample --checkpoint {folder} {given_input}")


def _show_dry_run(report: Any) -> None:
    say("parameters      " + ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in report.parameters.items()))
    say(
        "memory          "
        + ", ".join(f"{name} {count / 2**20:.0f} MiB" for name, count in report.memory.items())
        + ", and activations"
    )
    if report.peak_memory is not None:
        say(f"peak            {report.peak_memory / 2**30:.2f} GiB")
    say(
        f"time            {report.seconds_per_step:.3f} s per step, {report.remaining_seconds / 60:.1f} "
        f"min for {report.remaining_steps} steps"
    )
    say(
        f"disk            {report.checkpoint_bytes / 2**20:.0f} MiB per checkpoint, "
        f"{report.disk_bytes / 2**20:.0f} MiB at most"
    )
