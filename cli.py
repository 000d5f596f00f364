"""The command line: parse, call one function, print. The only file that prints.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

import functools
import json
import os
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crossflow import __version__
from crossflow.core.errors import UserError
from crossflow.core.files import is_full
from crossflow.tasks import task_names

if TYPE_CHECKING:
    from crossflow.engine.sample import Pipeline

TASKS = task_names()


def say(text: str = "") -> None:
    click.echo(text)


class Commands(click.Group):
    """Lists commands in the order they were written, and near names for an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            from crossflow.core.errors import unknown_name

            raise unknown_name("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="crossflow")
def command() -> None:
    """Noise-free cross-modal flow models: train, sample, evaluate.

    A source (a sentence, a photograph) becomes a latent of the target's shape, and a transformer flows it into the
    target (a picture, a caption, a depth map, a sharper picture).

    \b
      crossflow train --task t2i                          train on embedded data, no download
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a red cube"
      crossflow evaluate --checkpoint runs/t2i_tiny       scores and a page of pictures
    """


@command.command()
@click.option("--task", type=click.Choice(TASKS), help="What to train; needed unless --config says it.")
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
def train(
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
    import shutil
    import tempfile

    from crossflow.core import distributed
    from crossflow.engine.train import Run, new_folder
    from crossflow.tasks.base import load_config, task_class

    distributed.device()  # joins the processes of a launcher, if there are several
    resumed = (
        output
        if resume is not None and recipe is None and output is not None and (output / "config.yaml").exists()
        else None
    )
    if task is None and recipe is None and resumed is None:
        raise UserError(
            f"Say what to train: --task {'|'.join(TASKS)}, or --config with a recipe (crossflow list configs)."
        )
    name = recipe or f"{task}_tiny"
    given = ([f"data.train={data}"] if data is not None else []) + list(overrides)
    config = load_config(resumed or name, given, task)
    if resume is not None and output is None:
        raise UserError("--resume continues the run in --output; say which directory that is.")
    progress = _progress()
    if dry_run:
        config = load_config(resumed or name, [*given, *task_class(config.task).quick], task)
        scratch = Path(distributed.on_main(lambda: tempfile.mkdtemp(prefix="crossflow-dry-run-")))
        try:
            report = Run(config, scratch / "run", progress=progress).dry_run()
        finally:
            if distributed.is_main():
                shutil.rmtree(scratch, ignore_errors=True)
        if distributed.is_main():
            _show_dry_run(report)
        return
    # With several processes each must name the same new folder: only the first may look what is taken.
    folder = output or Path(distributed.on_main(lambda: str(new_folder(Path("runs"), Path(name).stem))))
    run = Run(config, folder, progress=progress, resume=resume, data_changed=data_changed)
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
        _show_scores(outcome.scores.values, outcome.scores.intervals, outcome.baseline, run.task.headline)
        for note in outcome.scores.notes:
            say(f"note: {note}")
    prompt = '"a red cube"' if run.config.data.train == "scenes" else "TEXT"
    given_input = f"--prompt {prompt}" if run.task.input_kind == "text" else "--input PICTURE"
    say(f"The run is in {folder}. Use it: crossflow sample --checkpoint {folder} {given_input}")


def _progress() -> Any:
    from rich.console import Console

    from crossflow.core.training.tracking import RichProgress

    return RichProgress(Console(stderr=False))


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


def _show_scores(
    values: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    baseline: dict[str, float],
    headline: Sequence[str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("score", "this run", "95 % interval", *(["trivial baseline"] if baseline else []))
    names = [name for name in headline if name in values] + [name for name in values if name not in headline]
    for name in names:
        low, high = intervals.get(name, (None, None))
        span = "" if low is None else f"{low:.4g} to {high:.4g}"
        table.add_row(
            name,
            f"{values[name]:.4g}",
            span,
            *([f"{baseline[name]:.4g}" if name in baseline else ""] if baseline else []),
        )
    Console().print(table)


SHARED = ("sample", "evaluate")
"""Commands whose items are shared by the processes of a launcher."""


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


def uses_checkpoint(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a checkpoint and its solver, and calls it with a `Use` in front.

    Of several processes only the first works, unless the command is one of SHARED.
    """

    @functools.wraps(function)
    def run(
        checkpoint: str, weights: str | None, device: str | None, seed: int, output: Path | None, **others: Any
    ) -> None:
        from crossflow.core import distributed
        from crossflow.core.config import parse_overrides
        from crossflow.engine.sample import load

        if distributed.announced():
            distributed.device()  # joins the processes of a launcher
            if not distributed.is_main() and function.__name__ not in SHARED:
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

    decorated: Callable[..., None] = run
    for option in reversed(
        [
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
        ]
    ):
        decorated = option(decorated)
    return decorated


@contextmanager
def _bar(label: str, after: float = 2.0, every: float = 15.0) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that shows itself when the work takes longer than `after` seconds; (done, total) moves it. Where
    there is no terminal, a line each `every` seconds. Of several processes the first one tells.
    """
    from rich.console import Console
    from rich.progress import Progress

    console, is_first = Console(), os.environ.get("RANK", "0") == "0"
    bar = Progress(console=console, transient=True, disable=not (console.is_terminal and is_first))
    task, told = bar.add_task(label, total=None), time.monotonic()
    # A clock of its own: the first step of a large model, or a solver that counts none, may take long.
    clock = threading.Timer(after, bar.start)
    clock.daemon = True
    clock.start()

    def move(done: int, total: int) -> None:
        nonlocal told
        bar.update(task, completed=done, total=total)
        if is_first and not console.is_terminal and time.monotonic() - told > every:
            told = time.monotonic()
            say(f"{label}: {done} of {total}")

    try:
        yield move
    finally:
        clock.cancel()
        clock.join()
        if bar.live.is_started:
            bar.stop()


def _inputs(
    pipe: "Pipeline", prompts: Sequence[str], prompt_file: Path | None, inputs: Sequence[Path]
) -> list[tuple[str, Any]]:
    """(name, input) of everything asked for; raises UserError when it does not fit the task."""
    from crossflow.data.images import load_image
    from crossflow.data.reader import IMAGE_SUFFIXES

    if pipe.task.input_kind == "text":
        if inputs:
            raise UserError(
                "This is a text-to-image run: give --prompt or --prompts, not --input. To turn a "
                "picture into its latent use `crossflow invert`."
            )
        texts = list(prompts)
        if prompt_file is not None:
            try:
                lines = prompt_file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise UserError(f"{prompt_file} is not a text file in UTF-8: {error}.") from error
            texts += [line.strip() for line in lines if line.strip()]
        if not texts:
            raise UserError(
                'Say what to draw: --prompt "a red cube" (several times if you like), '
                "or --prompts FILE with one per line."
            )
        return [(f"{number:04d}", pipe.task.read_input(text)) for number, text in enumerate(texts)]
    if prompts or prompt_file is not None:
        raise UserError(
            f"This is a {pipe.task.name} run, which takes pictures: give --input FILE or FOLDER, not a prompt."
        )
    files = [file for path in inputs for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES or file in inputs]
    if not files:
        raise UserError("No pictures came. Give --input with a picture or a folder of pictures (png, jpg, webp, ...).")
    found: list[tuple[str, Any]] = []
    bad: list[str] = []
    for file in files:
        try:
            picture, taken = load_image(file), {name for name, _ in found}
            others = (f"{file.stem}_{number}" for number in range(1, len(files) + 1))
            found.append((next(name for name in (file.stem, *others) if name not in taken), picture))
        except (ValueError, OSError) as error:
            bad.append(f"{file}: {error}")
    if not found:
        raise UserError(f"None of the {len(files)} files could be read as a picture. {bad[0]}")
    for line in bad:
        click.echo(f"skipped {line}", err=True)
    return found


@command.command()
@uses_checkpoint
@click.option("--prompt", "prompts", multiple=True, help="A prompt, for text-to-image; may be given several times.")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with one prompt per line.",
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A picture or a folder of pictures, for the other tasks.",
)
@click.option("--num", default=1, show_default=True, type=click.IntRange(1), help="Outputs per input.")
def sample(
    use: Use,
    prompts: Sequence[str],
    prompt_file: Path | None,
    inputs: Sequence[Path],
    num: int,
) -> None:
    """Make pictures from prompts, or captions, depth maps, sharper pictures from pictures.

    \b
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a red cube left of a blue sphere" --num 4
      crossflow sample --checkpoint runs/depth_tiny --input photo.jpg
      crossflow sample --checkpoint runs/t2i_tiny --prompt "a cube" --guidance 3 guidance_interval=[0.1,0.8] zero_init=1

    KEY=VALUE sets any field of the recipe's `sample` section.
    """
    from crossflow.core import distributed

    pipe = use.pipe
    asked = _inputs(pipe, prompts, prompt_file, inputs)
    folder = use.output or Path("outputs") / pipe.task.name
    ids = _item_ids(asked)
    # Several processes take an equal share each; the first writes what all have made.
    size = -(-len(asked) // distributed.world_size())
    shares = [range(start, min(start + size, len(asked))) for start in range(0, len(asked), size)]
    with _bar("sampling") as on_step:

        def make(share: range) -> list[Any]:
            values, names = [asked[i][1] for i in share], [ids[i] for i in share]
            return pipe(values, ids=names, num=num, seed=use.seed, on_step=on_step, **use.settings)

        results = [result for _, made in distributed.shared(shares, make) for result in made]
    if not distributed.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    names = []
    for index, result in enumerate(results):
        name, value = asked[index // num]
        stem = folder / (f"{name}_{index % num}" if num > 1 else name)
        about: dict[str, Any] = {"item": ids[index // num], "number": index % num}
        about |= {"prompt": value} if isinstance(value, str) else {}
        written += pipe.task.write_output(result, stem, use.metadata(**about))
        if isinstance(result, str):
            say(f"{name}: {result}")
        names.append(value if isinstance(value, str) else name)
    if len(results) > 1 and (shown := pipe.task.pictures(results)):
        written.append(_write_grid(shown, names, folder / "grid.png"))
    say(f"Wrote {len(written)} files to {folder}" + (f" ({written[-1].name})" if written else "") + ".")


def _item_ids(asked: Sequence[tuple[str, Any]]) -> list[str]:
    """What the noise is keyed by: the prompt, or the picture's name, so that one can be made again without the
    others. A prompt that comes again is another item.
    """
    ids: list[str] = []
    times: Counter[str] = Counter()
    for name, value in asked:
        words = value if isinstance(value, str) else name
        times[words] += 1
        ids.append(words if times[words] == 1 else f"{words}#{times[words]}")
    return ids


def _write_grid(pictures: Sequence[Any], names: Sequence[str], path: Path) -> Path:
    from crossflow.data.images import save_png, sheet

    cell, columns = min(512, max(128, pictures[0].shape[1])), len(pictures) if len(pictures) <= 6 else None
    return save_png(sheet(list(pictures), list(names), columns=columns, cell=cell), path)


def _recall(context: click.Context, _: click.Parameter, value: str | None) -> Any:
    """The options of the evaluation that is repeated become the defaults of all others."""
    if value is None:
        return None
    from crossflow.benchmarks.evaluation.manifest import options_of, read_evaluation

    before = read_evaluation(value)
    context.default_map = options_of(before.manifest)
    return before


@command.command()
@uses_checkpoint
@click.option(
    "--protocol", "protocol_name", help="A name (crossflow list protocols) or a YAML file. Default: the task's rules."
)
@click.option("--data", help="Data to score on. Default: the run's own, or those embedded for the protocol.")
@click.option("--split", type=click.Choice(["train", "val", "test", "all"]), help="Default: test, or the protocol's.")
@click.option("--num", type=click.IntRange(1), help="Items to score at most. Default: 1000, or all of the protocol.")
@click.option(
    "--network",
    "networks",
    multiple=True,
    metavar="ROLE=SOURCE",
    help="Another network that measures, such as clip=FOLDER, features=inception=FILE, features=timm:resnet50.",
)
@click.option(
    "--statistics",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Statistics of the real pictures, as crossflow statistics writes them.",
)
@click.option(
    "--repeat",
    is_eager=True,
    callback=_recall,
    metavar="MANIFEST",
    help="Measure again what this metrics.json says, and tell whether the numbers are the same.",
)
def evaluate(
    use: Use,
    protocol_name: str | None,
    data: str | None,
    split: str | None,
    num: int | None,
    networks: Sequence[str],
    statistics: Path | None,
    repeat: Any,
) -> None:
    """Score a run on held-out data: metrics.json with its manifest, one row per item, and a page of pictures.

    \b
      crossflow evaluate --checkpoint runs/sr_small --protocol set5-x4 --data folder:~/Set5@all --steps 1
      crossflow evaluate --checkpoint runs/t2i --protocol coco-fid30k --data coco:~/coco --guidance 7
      crossflow evaluate --checkpoint runs/t2i --protocol coco-fid30k --data coco:~/coco --num 5000 \\
        --network features=timm:resnet50 --network clip=~/clip-vit-base-patch32
      crossflow evaluate --repeat runs/sr_small/evaluation/NAME/metrics.json

    A protocol fixes the split, the preparation of pictures and how each number is computed; the manifest tells all of
    it and the rest. Noise follows from the seed and the item's id, so neither batch_size=N nor the number of processes
    (torchrun, accelerate launch) changes the result. A killed evaluation goes on when the command is given again.
    """
    from crossflow.benchmarks.evaluation.evaluate import evaluate as run
    from crossflow.benchmarks.evaluation.manifest import expect_repeated
    from crossflow.benchmarks.evaluation.protocol import load_protocol, protocol_of, roles

    pipe, protocol, settings, folder = use.pipe, None, use.settings, use.output
    if protocol_name is not None:
        protocol = load_protocol(protocol_name)
    elif repeat is not None and repeat.manifest.get("protocol"):
        protocol = protocol_of(repeat.manifest["protocol"])
    if networks:
        if protocol is None:
            raise UserError("--network replaces a network of a protocol; say which one by --protocol.")
        protocol = protocol.using(roles(networks))
    if repeat is not None:
        settings = {**repeat.manifest["sample"], **settings}
        folder = folder or repeat.path.parent / "repeated"
    with _bar("scoring") as on_step:
        report = run(
            pipe,
            spec=data,
            split=split,
            num=num,
            seed=use.seed,
            settings=settings,
            folder=folder,
            progress=lambda what, done, total: on_step(done, total),
            protocol=protocol,
            statistics=statistics,
            moved=use.moved,
        )
    if report is None:  # the first of several processes writes and tells
        return
    headline = pipe.task.headline if protocol is None else protocol.headline
    _show_scores(report.scores.values, report.scores.intervals, report.baseline, headline)
    for note in report.scores.notes:
        say(f"note: {note}")
    say(f"Wrote {report.folder / 'metrics.json'} and the pictures beside it ({report.folder / 'index.html'}).")
    if repeat is not None:
        say(expect_repeated(repeat, report.scores.values, report.manifest))


@command.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def compare(first: Path, second: Path) -> None:
    """Two evaluations side by side: their numbers, and everything in which they differ.

    FIRST and SECOND are metrics.json files, or the folders that hold them.

    \b
      crossflow compare runs/a/evaluation/set5-x4-Set5-all-euler1 runs/b/evaluation/set5-x4-Set5-all-euler1
    """
    from rich.console import Console
    from rich.table import Table

    from crossflow.benchmarks.evaluation.manifest import differences, read_evaluation, score_rows

    one, other = read_evaluation(first), read_evaluation(second)
    table = Table("score", "first", "second", "difference", "")
    for name, a, b, word in score_rows(one, other):
        table.add_row(name, f"{a:.5g}", f"{b:.5g}", f"{b - a:+.3g}", word)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    found = differences(one.manifest, other.manifest)
    for meaning, lines in found.items():
        say(f"{meaning}:")
        for line in lines:
            say(f"  {line}")
    if not found:
        say("Nothing that decides the numbers differs.")


@command.command()
@click.option("--protocol", "protocol_name", required=True, help="One with a distance, such as coco-fid30k.")
@click.option("--data", required=True, help="The real pictures.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option("--network", "networks", multiple=True, metavar="features=SOURCE", help="Another feature network.")
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
def statistics(protocol_name: str, data: str, output: Path, networks: Sequence[str], device: str | None) -> None:
    """Statistics of real pictures for the distances of a protocol, to be carried to another machine.

    They are kept in the user's cache by the data's fingerprint, the protocol's preparation and the network's checksum,
    and are computed once; `crossflow evaluate --statistics FILE` takes them without the pictures of the split.

    \b
      crossflow statistics --protocol coco-fid30k --data coco:~/coco --output coco_val_256.safetensors
    """
    from crossflow.benchmarks.evaluation.distances import statistics_of
    from crossflow.benchmarks.evaluation.protocol import load_protocol, roles
    from crossflow.engine.sample import find_device

    protocol = load_protocol(protocol_name).using(roles(networks))
    with _bar("real pictures") as on_step:
        found = statistics_of(protocol, data, find_device(device), lambda what, done, total: on_step(done, total))
    found.save(output)
    say(f"{found.count} pictures, {found.about['network']}. Wrote {output}.")


def _given(pipe: "Pipeline", text: str | None) -> Any:
    """An input as typed: a prompt for text-to-image, else the path of a picture."""
    if text is None or pipe.task.input_kind == "text":
        return None if text is None else pipe.task.read_input(text)
    path = Path(text)
    if not path.is_file():
        raise UserError(f"This is a {pipe.task.name} run, which takes pictures, and there is no file {text}.")
    try:
        return pipe.task.read_input(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error


def _write_all(use: Use, results: Sequence[Any], names: Sequence[str], folder: Path, **about: Any) -> None:
    """What the task writes for every result, and a grid of them."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for index, (result, name) in enumerate(zip(results, names, strict=True)):
        written += use.pipe.task.write_output(result, folder / f"{index:03d}", use.metadata(what=name, **about))
        if isinstance(result, str):
            say(f"{name}: {result}")
    if pictures := use.pipe.task.pictures(results):
        written.append(_write_grid(pictures, names, folder / "grid.png"))
    say(f"Wrote {len(written)} files to {folder} ({written[-1].name}).")


def _animate(use: Use, results: Sequence[Any], folder: Path, fps: float) -> None:
    """An animated GIF of results that are pictures, and an MP4 where that can be written."""
    from crossflow.engine import animation

    pictures = use.pipe.task.pictures(results)
    if not pictures:
        return
    say(f"Animated: {animation.save_gif(pictures, folder / 'animation.gif', fps)}")
    if animation.can_write_mp4():
        say(f"Animated: {animation.save_mp4(pictures, folder / 'animation.mp4', fps)}")
    else:
        say(f"For an MP4 beside it: {animation.VIDEO_EXTRA}")


def mixes_latents(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command of `uses_checkpoint` the options that say which source latents are mixed."""
    function = click.option("--mean", is_flag=True, help="Take means of the source posteriors instead of samples.")(
        function
    )
    return click.option(
        "--noise",
        type=click.Choice(["shared", "own"]),
        default="shared",
        show_default=True,
        help="Samples take the same noise, so that they differ by their meaning alone, or each its own.",
    )(function)


@command.command()
@uses_checkpoint
@click.option("--from", "start", required=True, help="A prompt, or the path of a picture.")
@click.option("--to", "end", required=True, help="A prompt, or the path of a picture.")
@click.option("--frames", default=9, show_default=True, type=click.IntRange(2))
@click.option(
    "--kind",
    default="lerp",
    show_default=True,
    type=click.Choice(["lerp", "slerp"]),
    help="Straight line or great circle.",
)
@mixes_latents
@click.option("--fps", default=8.0, show_default=True, type=click.FloatRange(0.1, 60), help="Frames per second.")
def interpolate(
    use: Use,
    start: str, end: str, frames: int, kind: str, noise: str, mean: bool, fps: float,
) -> None:  # fmt: skip
    """Walk from one source to another in the latent space; a picture of another size than the first is cropped and
    resized to it.

    Writes what the task makes of every frame and, of pictures, a grid, an animated GIF and (with the extra `video`) an
    MP4.

    \b
      crossflow interpolate --checkpoint runs/t2i_tiny --from "a red cube" --to "a blue sphere" --frames 16
      crossflow interpolate --checkpoint runs/depth_tiny --from one.jpg --to other.jpg --kind slerp
    """
    from crossflow.engine import latents

    pipe = use.pipe
    ends = _given(pipe, start), _given(pipe, end)
    with _bar("walking") as on_step:
        results = latents.interpolate(
            pipe,
            *ends,
            frames,
            kind=kind,
            seed=use.seed,
            shared_noise=noise == "shared",
            on_step=on_step,
            **use.settings | ({"mode": True} if mean else {}),
        )
    names = [f"{index / (frames - 1):.2f}" for index in range(frames)]
    folder = use.output or Path("outputs") / "interpolate"
    about: dict[str, Any] = {"from": start, "to": end, "kind": kind, "noise": noise, "mean": mean}
    _write_all(use, results, names, folder, **about)
    _animate(use, results, folder, fps)


@command.command()
@uses_checkpoint
@click.option("--base", required=True, help="A prompt, or the path of a picture.")
@click.option("--plus", help="What is added.")
@click.option("--minus", help="What is subtracted.")
@click.option(
    "--strength",
    "strengths",
    multiple=True,
    type=float,
    default=(1.0,),
    show_default=True,
    help="k of base + k (plus - minus); may be given several times.",
)
@click.option(
    "--restandardise",
    is_flag=True,
    help="Bring the result to mean 0 and deviation 1 over its whole latent, as the released demo does.",
)
@mixes_latents
def arithmetic(
    use: Use,
    base: str, plus: str | None, minus: str | None,
    strengths: Sequence[float], restandardise: bool, noise: str, mean: bool,
) -> None:  # fmt: skip
    """Latent arithmetic: base + k (plus - minus), with --plus, --minus or both.

    \b
      crossflow arithmetic --checkpoint runs/t2i_small --base "a red cube" --minus red --plus blue --strength 0.5
      --strength 1
      crossflow arithmetic --checkpoint runs/t2i_small --base "a red cube" --plus "a blue sphere" --restandardise
    """
    from crossflow.engine import latents

    pipe = use.pipe
    terms = {"plus": _given(pipe, plus), "minus": _given(pipe, minus)}
    with _bar("computing") as on_step:
        results = latents.arithmetic(
            pipe,
            _given(pipe, base),
            **terms,
            strengths=strengths,
            restandardise=restandardise,
            seed=use.seed,
            shared_noise=noise == "shared",
            on_step=on_step,
            **use.settings | ({"mode": True} if mean else {}),
        )
    folder = use.output or Path("outputs") / "arithmetic"
    about: dict[str, Any] = {"base": base, "plus": plus, "minus": minus, "restandardise": restandardise}
    _write_all(use, results, [f"k = {k:g}" for k in strengths], folder, **about, noise=noise, mean=mean)


@command.command()
@uses_checkpoint
@click.option(
    "--input", "value", required=True, help="What the task makes: a picture, a caption, a depth PNG in millimetres."
)
@click.option("--source", help="The input it belongs to; only for noise-source baselines.")
def invert(
    use: Use,
    value: str, source: str | None,
) -> None:  # fmt: skip
    """Flow an output back to its source latent, and forward again; writes the latent and what came of it."""
    from safetensors.torch import save_file

    from crossflow.engine import latents

    pipe, given = use.pipe, {"solver": "heun", "steps": 50, **use.settings}
    if len(given) > 2:
        raise UserError(
            "An inversion runs the plain flow backwards: it takes --solver and --steps, and no other setting."
        )
    belongs_to = _given(pipe, source)
    try:
        with _bar("inverting") as on_step:
            z0, again, rmse = latents.invert(pipe, value, source=belongs_to, seed=use.seed, on_step=on_step, **given)
    except UserError:
        raise
    except ValueError as error:  # of the readers of pictures and depth maps
        raise UserError(
            f"{value} cannot be inverted: {error}. Give what this {pipe.task.name} run makes, see --help."
        ) from error
    folder = use.output or Path("outputs") / "invert"
    _write_all(use, [again], ["re-generated"], folder, input=value, settings=given)
    save_file({"z0": z0.contiguous()}, folder / "latent.safetensors")
    say(f"The source latent is {folder / 'latent.safetensors'}: mean {z0.mean():.3f}, deviation {z0.std():.3f}. "
        f"Root mean squared error of the re-generated latent: {rmse:.2g}.")  # fmt: skip


@command.command()
@click.option("--config", "recipe", help="The recipe that will be trained: a shipped name, a YAML file, or a run.")
@click.option("--data", help="jsonl:FILE, coco:DIR, folder:DIR, prompts:FILE, npy:DIR, ... (crossflow list datasets).")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the cache; give it again to go on.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=click.Choice(["train", "val", "test", "all"]),
    help="May be given several times. Default: train, and val where the data have one.",
)
@click.option(
    "--resolution",
    "sizes",
    multiple=True,
    type=click.IntRange(4, 4096),
    help="Side of the pictures in pixels; may be given several times. Default: the recipe's data.image_size.",
)
@click.option(
    "--precision",
    "storage",
    default="float16",
    show_default=True,
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type that features are stored in.",
)
@click.option("--num", type=click.IntRange(1), help="Items of each split at most.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Items encoded at once.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Threads that decode pictures.")
@click.option(
    "--shard-items",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="Items per file, and what a killed run computes again at most.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
@click.option("--dry-run", is_flag=True, help="Say how large the cache will be; nothing is written.")
@click.option(
    "--verify",
    "verified",
    type=click.Path(path_type=Path),
    help="Check the cache in this folder instead; with --data also whether pictures or captions changed since.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def cache(
    recipe: str | None,
    data: str | None,
    output: Path | None,
    splits: Sequence[str],
    sizes: Sequence[int],
    storage: str,
    num: int | None,
    batch_size: int,
    workers: int,
    shard_items: int,
    device: str | None,
    dry_run: bool,
    verified: Path | None,
    overrides: Sequence[str],
) -> None:
    """Compute what frozen networks make of a data set once, so that training only reads it.

    Kept are the moments of pictures (each epoch draws a new latent from them), the features of all captions without
    padding, and what the recipe's encoder loss aligns with: embeddings of the image tower, or small pictures.

    \b
      crossflow cache --config t2i_256_clip_dimr --data jsonl:jdb/img_text_pair.jsonl --output cached \\
        text.encoder=openai/clip-vit-large-patch14 codec.source=stabilityai/sd-vae-ft-ema
      crossflow train --config t2i_256_clip_dimr --data cache:cached text.encoder=... codec.source=...
      crossflow cache --config mine.yaml --data coco:coco2014 --output cached --resolution 256 --resolution 512
      crossflow cache --config mine.yaml --data npy:jdb --output cached     feature files of the released scripts
      crossflow cache --verify cached

    A run that was killed goes on when the same command is given again, and ends with the same bytes. Several processes
    share the work under torchrun or accelerate launch. A cache is bound to the weights of its networks, and training
    refuses one that was made with others.
    """
    if verified is not None:
        _verify_cache(verified, data)
        return
    given = {"--config": recipe, "--data": data, "--output": output}
    missing = [name for name, value in given.items() if value is None]
    if recipe is None or data is None or output is None:
        raise UserError(f"A cache needs {' and '.join(missing)}; see crossflow cache --help.")
    from crossflow.core.files import size_in_words
    from crossflow.data.cache.build import Settings
    from crossflow.engine import cache as caching
    from crossflow.engine.sample import find_device
    from crossflow.tasks.base import load_config

    config = load_config(recipe, overrides)
    builder = caching.builder(
        config,
        data,
        output,
        splits=splits,
        sizes=sizes,
        storage=storage,
        device=str(find_device(device or caching.own_device())),
        num=num,
        settings=Settings(shard_items, batch_size, workers, config.data.max_bad),
    )
    # Processes of a launcher share the work without waiting for each other; the first one speaks for all.
    tell = say if os.environ.get("RANK", "0") == "0" else _say_nothing
    expected = builder.estimate()
    counts = ", ".join(f"{len(reader)} {split}" for split, reader in builder.readers.items())
    parts = ", ".join(builder.extractor.describe()["parts"])
    tell(
        f"{counts} items, {parts}: about {size_in_words(expected.num_bytes)} "
        f"({size_in_words(expected.bytes_per_item)} per item) in {output}; {size_in_words(expected.free)} are free."
    )
    if expected.finished:
        tell(f"Going on: {size_in_words(expected.finished)} are there already.")
    expected.require(output)
    if dry_run:
        return
    with _bar("caching") as on_step:
        summary = builder.run(on_step)
    for id, reason in list(summary.bad.items())[:20]:
        click.echo(f"skipped {id}: {reason}", err=True)
    tell(
        f"{'Cached' if summary.complete else 'So far cached'} {summary.num_items} items "
        f"({summary.new_items} new, {len(summary.bad)} skipped"
        f"{', listed in the .json files there' if len(summary.bad) > 20 else ''}), "
        f"{size_in_words(summary.num_bytes)} in {output}."
    )
    if summary.complete and any("moments" in part for part in builder.extractor.describe()["parts"]):
        tell(f"Train from it: crossflow train --config {recipe} --data cache:{output} {' '.join(overrides)}".rstrip())


def _say_nothing(text: str = "") -> None: ...


def _verify_cache(folder: Path, data: str | None) -> None:
    from crossflow.core.files import size_in_words
    from crossflow.data.cache.verify import verify
    from crossflow.engine import cache as caching

    with _bar("verifying") as on_step:
        report = verify(folder, on_step)
    problems, advice = report.problems, "Remove the .json files of these shards and cache again; the others are kept."
    if data is not None and not problems:
        with _bar("comparing with the data") as on_step:
            problems = caching.differences(folder, data, on_step)
        advice = "The data are not those that were cached: cache them again, in another folder."
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"The cache in {folder} has {len(problems)} problems:{listed}{more}\n{advice}")
    say(f"{folder} is as it was written: {report.num_items} items, {size_in_words(report.num_bytes)}.")


@command.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--kind", help="dimr, dit, flowtok, flowtitok or autoencoder_kl; needed for other than released files.")
@click.option(
    "--config",
    "reference",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON or YAML file of the reference's own settings; needed for other than released files.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def convert(source: Path, target: Path, kind: str | None, reference: Path | None, overrides: Sequence[str]) -> None:
    """Turn a released CrossFlow or FlowTok file into a run directory, or a run directory back into such a file.

    SOURCE is a file (.pth, .bin, .pt, .safetensors) and TARGET a new folder, or the other way round. The released files
    are recognised by their tensors: CrossFlow on DiMR (256 and 512 px, CLIP and T5) and on DiT, FlowTok-XL and -H, the
    FlowTiTok tokenizer, and the autoencoder of Stable Diffusion under its original names.

    \b
      crossflow convert t2i_256px_clip_dimr.pth runs/released
      crossflow sample --checkpoint runs/released --prompt "a corgi in a spacesuit"
      crossflow convert t2i_512px_t5_dit.pth runs/t5 text.encoder=~/t5-v1_1-xxl text.precision=bfloat16
      crossflow convert FlowTiTok_512.bin codecs/flowtitok
      crossflow convert FlowTok-XL.pth runs/flowtok codec.source=codecs/flowtitok
      crossflow convert runs/released original.pth            back to the original keys, bit for bit
      crossflow convert small.pth runs/small --kind dimr --config settings.json

    KEY=VALUE overrides settings of the run. Its text encoder (CLIP ViT-L/14, T5-XXL) and autoencoder are named, not
    copied: by hub id unless text.encoder and codec.source say another id or a folder, and they can be replaced later by
    --set. No code in a file is ever run, and it is read piece by piece, never into memory as a whole.
    """
    from crossflow.released.convert import from_file
    from crossflow.released.restore import to_file

    back = source.is_dir()
    if back and (reference is not None or overrides):
        raise UserError("A folder is written back as it is: --config and KEY=VALUE belong to the way there.")
    with _bar("converting") as on_bytes:
        if back:
            done = to_file(source, target, kind=kind, progress=on_bytes)
        else:
            done = from_file(source, target, kind=kind, config=reference, overrides=overrides, progress=on_bytes)
    say(f"{done.name}, kind {done.kind}: {done.num_tensors} tensors. Wrote {done.path}.")
    for reason, keys in done.dropped.items():
        say(f"{'Left out then' if back else 'Left out'}: {len(keys)} tensors ({keys[0]}, ...), {reason}.")
    for note in done.notes:
        say(note)
    if not back and (done.path / "config.yaml").is_file():
        say(f'Use it: crossflow sample --checkpoint {done.path} --prompt "..."')


@command.command()
@click.argument("group", required=False)
@click.option("--list", "listed", is_flag=True, help="The groups, their variants and the tables they belong to.")
@click.option("--task", default="t2i", show_default=True, type=click.Choice(TASKS))
@click.option("--recipe", help="What the runs start from. Default: TASK_tiny.")
@click.option("--data", help="Training data. Default: the recipe's.")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of each run. Default: the recipe's.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Instead: as many steps for all as the slowest variant makes in so many minutes here.",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Seeds 0, 1, ... of each variant.")
@click.option("--only", multiple=True, help="A variant to run; may be given several times. Default: all.")
@click.option("--protocol", help="By which runs are evaluated (crossflow list protocols). Default: the task's rules.")
@click.option("--eval-data", help="What they are evaluated on. Default: the recipe's data, or the protocol's.")
@click.option("--num", type=click.IntRange(1), help="Items of each evaluation. Default: 240, or all of the protocol.")
@click.option("--split", type=click.Choice(["val", "test", "all"]), help="Default: test, or the protocol's.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of runs and results. Default: ablations/GROUP.")
@click.option("--dry-run", is_flag=True, help="List the commands, and which of them are done; nothing is run.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE | VARIANT:KEY=VALUE]...")
def ablate(
    group: str | None,
    listed: bool,
    task: str,
    recipe: str | None,
    minutes: float | None,
    seeds: int,
    num: int | None,
    split: str | None,
    protocol: str | None,
    output: Path | None,
    dry_run: bool,
    **given: Any,
) -> None:
    """Train and compare the variants of a GROUP: encoder, loss, guidance, text, training, path, size or solver.

    \b
      crossflow ablate --list
      crossflow ablate encoder --minutes 3 --seeds 3
      crossflow ablate encoder --task depth --steps 500 --output ablations/depth
      crossflow ablate guidance --dry-run
      crossflow ablate text t5:text.encoder=~/t5-v1_1-xxl
      crossflow ablate size --recipe t2i_256_dimr_70m --data cache:cached --only crossflow-tiny --only baseline-tiny

    Each group is one file in configs/ablations; GROUP may also be a file of yours. Every run is a process of its own:
    one that fails is told and does not end the others. Ctrl-C, or a kill, loses at most what a run did since its last
    checkpoint: give the command again, and it goes on. The page (ablation.html, ablation.md, results.json) is written
    anew after every run, with the paper's numbers beside ours and what has not been run.
    """
    from crossflow.benchmarks.ablation import page as ablation_page
    from crossflow.benchmarks.ablation import plan as ablation_plan
    from crossflow.benchmarks.ablation import run as ablations

    if listed or group is None:
        _list_ablations()
        return
    if given["steps"] is not None and minutes is not None:
        raise UserError("Give --steps or --minutes, not both.")
    named = ablation_plan.load_group(group)
    folder = output or Path("ablations") / (named.name if task == "t2i" else f"{named.name}-{task}")
    given["overrides"] = tuple(given["overrides"])
    if protocol is None:
        num, split = num or 240, split or "test"
    budget = ablation_plan.Budget(
        task=task,
        recipe=recipe or f"{task}_tiny",
        seeds=tuple(range(seeds)),
        num_items=num,
        split=split,
        protocol=protocol,
        **given,
    )
    plan = ablations.planned(named, budget, folder, minutes, say, measure=not dry_run)
    if dry_run:
        for job in plan.jobs:
            say(f"{'done' if job.done else 'to do'}  crossflow {shlex.join(job.command)}")
        say(f"{len(plan.jobs)} commands, {sum(job.done for job in plan.jobs)} done; nothing was run.")
        return
    ablations.run(plan, say, after_each=lambda: ablation_page.write(plan))
    markdown, html = ablation_page.write(plan)
    left = [job.name for job in plan.jobs if not job.done]
    say(f"Wrote {html} and {markdown}." + (f" Not done: {', '.join(left)}." if left else ""))


def _list_ablations() -> None:
    from crossflow.benchmarks.ablation.plan import groups, load_group
    from crossflow.benchmarks.report.paper import paper

    for name in groups():
        group = load_group(name)
        where = paper().table(group.table).where.partition(";")[0] if group.table is not None else "in no paper"
        say(f"{name}: {group.title} ({where}); tasks {', '.join(group.tasks)}")
        say(f"    {group.about}")
        say(f"    variants: {', '.join(group.variants)}")
    say("Run one: crossflow ablate GROUP --minutes 3 --seeds 3 (--dry-run lists the commands; --help says more).")


@command.group()
def benchmark() -> None:
    """Measure and compare: quality beside the papers' numbers, speed on this machine."""


@benchmark.command()
@click.option(
    "--runs",
    "given",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Run directory, folder of runs or evaluations, or JSON file; may be given several times.",
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("quality"), show_default=True)
@click.argument("more", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR]...")
def quality(given: Sequence[Path], output: Path, more: Sequence[Path]) -> None:
    """One page: what was measured beside the papers' tables, what makes rows incomparable, and what each task costs.

    \b
      crossflow benchmark quality --runs runs
      crossflow benchmark quality --runs runs/sr_tiny runs/depth_tiny --output page

    It reads what `crossflow evaluate` has written; a run that was never evaluated is shown with the scores of the end
    of its training. Writes quality.md, with its pictures beside it, and quality.html, which holds everything.
    """
    from crossflow.benchmarks.report.quality import quality as compare

    markdown, html, problems = compare([*given, *more], output)
    for problem in problems:
        click.echo(f"not read: {problem}", err=True)
    say(f"Wrote {html} and {markdown}.")


@benchmark.command()
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    help="Recipes whose training steps or sampling are timed. Default: every tiny one, for sampling the papers'.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(["scenes", "training", "cache", "sampling"]),
    help="What is measured; may be given several times. Default: everything but sampling.",
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write.")
def speed(recipes: Sequence[str], parts: Sequence[str], output: Path | None) -> None:
    """Scenes rendered, seconds per training step, samples read and pictures made per second, on this machine.

    The part `cache` reads a feature cache and, side by side, files as the released CrossFlow scripts write them (one
    pickle per sample): `clip` holds what a 256 px CLIP model needs, `all` everything those scripts put into a file;
    `cold` means read from the disk.

    The part `sampling` times text encoder, source encoder, flow and decoder of the papers' models with random weights,
    with and without torch.compile: a batch of 64 in bfloat16 on a GPU; on a CPU one picture of two steps.
    """
    import tempfile

    from crossflow.benchmarks.speed import measures
    from crossflow.core.files import write_atomically

    with tempfile.TemporaryDirectory(prefix="crossflow-speed-") as folder, _bar("measuring") as on_step:
        found = measures.speed(
            recipes or [f"{task}_tiny" for task in TASKS],
            Path(folder),
            parts=parts or measures.USUAL,
            sampled=recipes or measures.generation.RECIPES,
            progress=on_step,
        )
    for row in [row for part in measures.PARTS for row in found.get(part, [])]:
        say("  ".join(f"{name} {value}" for name, value in row.items()))
    if output is not None:
        write_atomically(output, json.dumps(found, indent=1))
        say(f"Wrote {output}.")


@command.group()
def data() -> None:
    """Look at data before anything is trained on them."""


@data.command(name="check")
@click.argument("spec", metavar="SPEC")
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=click.Choice(["train", "val", "test", "all"]),
    help="May be given several times. Default: those of train, val and test that the data have.",
)
@click.option("--num", type=click.IntRange(1), help="Items of each split at most, spread over it. Default: all.")
@click.option("--shown", default=24, show_default=True, type=click.IntRange(0), help="Pictures on the contact sheet.")
@click.option("--max-bad", default=0.05, show_default=True, type=click.FloatRange(0, 1), help="Share that may be bad.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("outputs/data"), show_default=True, help="Folder."
)
def check_data(spec: str, splits: Sequence[str], num: int | None, shown: int, max_bad: float, output: Path) -> None:
    """Read every item of a data set: counts, sizes, what is bad and why, a contact sheet.

    \b
      crossflow data check coco:~/flickr8k
      crossflow data check kitti:~/kitti --split test
      crossflow data check "wds:shards/{00000..00009}.tar" --num 1000

    Writes SPLIT.json, SPLIT.png (the sheet) and SPLIT_bad.tsv (the bad items with reasons) into --output. The exit
    status is 2 when more than --max-bad of the items of a split are bad, at which a training would stop too.
    """
    from crossflow.data.check import inspect, open_splits, shared_ids, write

    readers, refused = open_splits(spec, splits, limit=num), []
    for split, reader in readers.items():
        with _bar(f"reading {split}") as on_step:
            found = inspect(reader, num_shown=shown, on_progress=on_step)
        files = write(found, output)
        say(f"{found.spec} ({split}): {found.good} of {found.total} items are good; has {', '.join(found.fields)}.")
        for name, value in found.numbers.items():
            say(f"  {name:18}{value}")
        say(f"  {'fingerprint':18}{found.fingerprint}")
        for id, reason in list(found.bad.items())[:20]:
            click.echo(f"bad {id}: {reason}", err=True)
        if len(found.bad) > 20:
            click.echo(f"and {len(found.bad) - 20} more in {output / f'{split}_bad.tsv'}", err=True)
        say(f"  Wrote {', '.join(map(str, files))}.")
        if len(found.bad) > max_bad * found.total:
            refused.append(f"{len(found.bad)} of the {found.total} items of {split}")
    for (one, other), ids in shared_ids(readers).items():
        say(f"note: {len(ids)} items are in both {one} and {other}, such as {ids[0]}.")
    if refused:
        raise UserError(f"{spec!r}: {' and '.join(refused)} are bad, and at most {max_bad:.0%} may be (--max-bad).")


@command.command(name="list")
@click.argument("what", type=click.Choice(["tasks", "configs", "datasets", "protocols", "solvers", "backbones"]))
def list_(what: str) -> None:
    """Names that can be used: tasks, configs, datasets, protocols, solvers, backbones."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    for row in _names(what):
        table.add_row(*map(Text, row))  # as it is: brackets are no markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _names(what: str) -> list[tuple[str, ...]]:
    if what == "tasks":
        from crossflow.tasks.base import task_class

        return [(name, (sys.modules[task_class(name).__module__].__doc__ or "").splitlines()[0]) for name in TASKS]
    if what == "configs":
        from crossflow.core.config import recipes

        return [(name, path.read_text().splitlines()[0].lstrip("# ")) for name, path in recipes().items()]
    if what == "datasets":
        from crossflow.data.readers import READERS

        return [
            (
                name,
                "\n".join(
                    [
                        READERS.get(name).layout,
                        *(f"?{key}={option.describe()}" for key, option in READERS.get(name).options.items()),
                    ]
                ),
                "has " + ", ".join(sorted(READERS.get(name).offers)),
            )
            for name in READERS.names()
        ]
    if what == "protocols":
        from crossflow.benchmarks.evaluation.protocol import load_protocol, protocols

        known = [(name, load_protocol(name)) for name in protocols()]
        return [(name, one.task, one.title, one.layout or f"embedded: {one.data}") for name, one in known]
    if what == "solvers":
        from crossflow.core.solvers import SOLVERS

        return [(name, ((SOLVERS.get(name) or _adaptive).__doc__ or "").splitlines()[0]) for name in SOLVERS.names()]
    from crossflow.core.backbones import size_tables

    return [
        (backbone, f"size {name}: depth {size.depth}, width {size.width}, {size.heads} heads")
        for backbone, sizes in size_tables().items()
        for name, size in sizes.items()
    ]


def _adaptive() -> None:
    """Dormand-Prince with adaptive steps (rtol = atol = 1e-5), from 0 to 1 - 1e-5."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 after a user's error, 130 after Ctrl-C. `argv` without
    program name.
    """
    import logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        command.main(args=list(argv) if argv is not None else None, prog_name="crossflow", standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except OSError as error:
        if is_full(error):
            click.echo("error: The disk is full. Make room, or choose another --output.", err=True)
        elif error.filename is not None:
            click.echo(f"error: {error.filename}: {error.strerror}.", err=True)
        else:
            raise
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
