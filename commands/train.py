"""``crossflow train``: a run from a recipe, or the continuation of one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crossflow.commands import options
from crossflow.commands.console import say, show_scores, training_progress
from crossflow.core.errors import UserError
from crossflow.tasks import task_names

if TYPE_CHECKING:
    from crossflow.core.config import Config
    from crossflow.core.training.dry_run import DryRun
    from crossflow.core.training.trainer import TrainResult
    from crossflow.engine.train import Outcome, Run


@click.command("train", short_help="Train a model on a task's recipe or on your own data.")
@click.option(
    "--task",
    type=options.TaskNames(),
    help="The task, or several to train jointly; not needed with a recipe in --config.",
)
@click.option(
    "--config",
    "recipe",
    type=options.RecipeName(),
    help="Shipped recipe (crossflow list configs) or YAML file. Default: TASK_tiny, joint_tiny for several tasks.",
)
@click.option(
    "--data", help="Training data: scenes, coco:DIR, jsonl:FILE, folder:DIR, pairs:DIR, ... (crossflow list datasets)."
)
@click.option("--output", type=options.PATH, help="Run directory. Default: runs/RECIPE, numbered if taken.")
@click.option("--resume", help="auto: from the newest intact checkpoint of --output; or a checkpoint's folder.")
@click.option("--data-changed", is_flag=True, help="Resume although the training data have changed.")
@click.option("--dry-run", is_flag=True, help="Print parameters, memory, time and disk; nothing is kept.")
@options.settings
def command(
    task: str | None, recipe: str | None, data: str | None, output: Path | None,
    resume: str | None, data_changed: bool, dry_run: bool, overrides: Sequence[str],
) -> None:  # fmt: skip
    """Train a model; KEY=VALUE overrides any setting of the recipe.

    \b
      crossflow train --task sr train.steps=2000 sr.scale=2
      crossflow train --task t2i --data coco:~/flickr8k --output runs/mine
      crossflow train --output runs/mine --resume auto
      crossflow train --task depth source.kind=gaussian      the noise-source baseline
      crossflow train --task t2i,caption,depth,sr            several tasks around one backbone (docs/joint.md)
      accelerate launch -m crossflow train --task t2i        on many GPUs

    Ctrl-C ends cleanly with a checkpoint. The run directory holds config, weights, samples, metrics and checkpoints.
    """
    if resume is not None and output is None:
        raise UserError("--resume continues the run in --output; add --output DIR.")
    from crossflow.core import distributed
    from crossflow.engine.folder import new_folder
    from crossflow.engine.joint.config import is_joint
    from crossflow.engine.train import finished
    from crossflow.tasks import load_config, task_class

    source = _source(task, recipe, output if resume is not None else None)
    settings = ([f"data.train={data}"] if data is not None else []) + list(overrides)
    if "," in (task or "") or (source != f"{task}_tiny" and is_joint(source)):
        _train_jointly(source, settings, task, output, resume, data_changed, dry_run)
        return
    config = load_config(source, settings, task)
    distributed.limit_waiting(config.train.timeout_minutes, "train.timeout_minutes")
    distributed.device()  # joins the processes of a launcher, if there are several
    if dry_run:
        quick = load_config(source, [*settings, *task_class(config.task).quick], task)
        _dry_run(quick, names_data=any(setting.startswith("data.train=") for setting in settings))
        return
    # All processes must name the same new folder, so the first one looks which names are taken.
    folder = output or distributed.on_main(lambda: new_folder(Path("runs"), Path(source).stem))
    if resume is not None and (outcome := finished(config, folder)) is not None:
        if distributed.is_main():
            say(f"The run in {folder} is finished: {outcome.result.step} of {config.train.steps} steps, and scored.")
            say("To train it further, give a larger train.steps=N.")
        return
    if distributed.is_main():
        say(f"Using {source} ({config.task}) on {config.data.train}. The run goes to {folder}.")
    train_into(folder, config, resume=resume, data_changed=data_changed)


def train_into(folder: Path, config: "Config", *, resume: str | None = None, data_changed: bool = False) -> None:
    """Trains the run, or continues it, and shows how it begins and ends."""
    from crossflow.core import distributed
    from crossflow.engine.train import Run

    run = Run.open(config, folder, resume=resume, data_changed=data_changed, progress=training_progress())
    if distributed.is_main():
        _show_start(config, run, folder)
    outcome = run.train()
    if distributed.is_main():
        _show_end(run, outcome, folder)


def _source(task: str | None, recipe: str | None, resumed: Path | None) -> str | Path:
    """Where the configuration comes from: the recipe, the resumed run's own folder, or the task's tiny recipe."""
    if recipe is not None:
        return recipe
    if resumed is not None and (resumed / "config.yaml").exists():
        return resumed
    if task is None:
        raise UserError(
            f"Neither a task nor a recipe is given. Give --task {'|'.join(task_names())}, or --config with a recipe "
            "(crossflow list configs)."
        )
    return "joint_tiny" if "," in task else f"{task}_tiny"


def _train_jointly(
    source: str | Path, settings: Sequence[str], tasks: str | None, output: Path | None,
    resume: str | None, data_changed: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Trains several tasks as one run, or measures it."""
    from crossflow.core import distributed
    from crossflow.engine.folder import new_folder
    from crossflow.engine.joint.config import load_joint
    from crossflow.engine.joint.run import JointRun, dry_run_jointly, finished_jointly

    config = load_joint(source, settings, tasks, quick=dry_run)
    distributed.limit_waiting(config.train.timeout_minutes, "train.timeout_minutes")
    distributed.device()  # joins the processes of a launcher, if there are several
    if dry_run:
        measured = dry_run_jointly(config, progress=training_progress())
        if distributed.is_main():
            _show_size(measured.parameters, measured.memory)
            _show_costs(measured)
        return
    folder = output or distributed.on_main(lambda: new_folder(Path("runs"), Path(source).stem))
    if resume is not None and finished_jointly(config, folder) is not None:
        if distributed.is_main():
            say(f"The run in {folder} is finished: {config.train.steps} steps, and every task is scored.")
            say("To train it further, give a larger train.steps=N.")
        return
    if distributed.is_main():
        say(f"Using {source} ({config.task}). The run goes to {folder}.")
    run = JointRun.open(config, folder, resume=resume, data_changed=data_changed, progress=training_progress())
    if distributed.is_main():
        parts = ", ".join(f"{part} {number / 1e6:.2f}M" for part, number in run.model.num_parameters().items())
        say(f"Training {config.task} into {folder} ({parts}; {config.train.steps} steps of {config.train.batch_size}).")
    outcome = run.train()
    if not distributed.is_main():
        return
    if _show_time(outcome.result, folder):
        for name, own in {**run.tasks, **run.backwards}.items():
            say(f"{name}:")
            _show_task(own, outcome.tasks[name])
            say(f"  crossflow sample --checkpoint {folder} --task {name} {_example(own)}")


def _show_start(config: "Config", run: "Run", folder: Path) -> None:
    parts = ", ".join(f"{part} {number / 1e6:.2f}M" for part, number in run.model.num_parameters().items())
    say(f"Training {config.task} into {folder} ({parts}; {config.train.steps} steps of {config.train.batch_size}).")


def _show_end(run: "Run", outcome: "Outcome", folder: Path) -> None:
    if _show_time(outcome.result, folder):
        _show_task(run, outcome)
        say(f"The run is in {folder}. Use it: crossflow sample --checkpoint {folder} {_example(run)}")


def _show_time(result: "TrainResult", folder: Path) -> bool:
    """Says how a training ended; whether it has completed its steps."""
    if result.status == "stopped":
        say(f"Stopped after step {result.step} ({result.reason}). Continue with:")
        say(f"  crossflow train --output {folder} --resume auto")
        return False
    trained = f"Trained {result.num_steps} steps in {result.seconds / 60:.1f} minutes"
    say(f"{trained if result.num_steps else f'The training had completed its {result.step} steps before'}.")
    return True


def _show_task(run: "Run", outcome: "Outcome") -> None:
    """Prints the scores of a task, and where its pictures are."""
    say(f"Samples: {run.folder / 'samples'}")
    if outcome.scores is not None:
        show_scores(outcome.scores.values, outcome.scores.intervals, outcome.baseline, run.task.Scoring.headline)
        for note in outcome.scores.notes:
            say(f"note: {note}")


def _example(run: "Run") -> str:
    """The options that give a trained run an input."""
    prompt = '"a red cube"' if run.config.data.train == "scenes" else "TEXT"
    return f"--prompt {prompt}" if run.task.input_kind == "text" else "--input PICTURE"


def _dry_run(config: "Config", names_data: bool) -> None:
    """Prints what a training takes: measured if the data are available, else as far as the settings determine it."""
    from crossflow.core import distributed
    from crossflow.engine.train import dry_run, estimate
    from crossflow.tasks import task_class

    try:
        task_class(config.task).dataset(config, "train")
    except UserError as error:
        if names_data:
            raise
        report = estimate(config)
        _show_size(report.parameters, report.memory)
        say(f"Time, disk and peak memory can only be measured with the training data. {error}")
        return
    measured = dry_run(config, progress=training_progress())
    if distributed.is_main():
        _show_size(measured.parameters, measured.memory)
        _show_costs(measured)


def _show_size(parameters: Mapping[str, int], memory: Mapping[str, int]) -> None:
    """Prints numbers of parameters, and bytes of memory, by part."""
    total = sum(memory.values())
    say("parameters      " + ", ".join(f"{name} {number / 1e6:.2f}M" for name, number in parameters.items()))
    sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items())
    say(f"memory          {total / 2**30:.2f} GiB ({sizes}), and activations")


def _show_costs(report: "DryRun") -> None:
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
