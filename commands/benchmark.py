"""``crossflow benchmark quality|speed|learning|joint|perception|agreement|plan``: results beside the papers' tables;
times on this machine, which recipe learns fastest on it, and whether its device computes what its CPU does.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands import options
from crossflow.commands.console import open_file, progress_bar, say, training_progress, warn
from crossflow.core.errors import UserError
from crossflow.core.output import check_output, output_folder
from crossflow.tasks import task_names


@click.group("benchmark", short_help="Measure speed, quality, learning; plan a training.")
def command() -> None:
    """Measure and compare: quality beside the papers' numbers, speed and correctness on this machine."""


@command.command()
@click.option(
    "--runs",
    "places",
    multiple=True,
    required=True,
    type=options.PATH,
    help="Run directory, folder of runs or evaluations, or JSON file; repeatable.",
)
@options.output_folder("quality")
@options.overwrite
@options.open_result
@click.argument("more", nargs=-1, type=options.PATH, metavar="[DIR]...")
def quality(
    places: Sequence[Path], output: Path | None, overwrite: bool, open_result: bool, more: Sequence[Path]
) -> None:
    """One page: measured scores beside the papers' tables, what makes rows incomparable, and what each task costs.

    \b
      crossflow benchmark quality --runs runs
      crossflow benchmark quality --runs runs/sr_tiny runs/depth_tiny --output page

    Reads the results of `crossflow evaluate`; a run that was never evaluated is shown with the scores of the end of its
    training. Writes quality.md with its pictures beside it, and quality.html as a single file.
    """
    from crossflow.benchmarks.report.quality import quality as write_page

    check_output(output, overwrite=overwrite)
    with output_folder(Path("quality"), output, overwrite=overwrite) as folder:
        say(f"Reading {', '.join(map(str, [*places, *more]))}. The page goes to {folder}.")
        markdown, html, problems = write_page([*places, *more], folder)
    for problem in problems:
        warn(f"not read: {problem}")
    say(f"Wrote {html} and {markdown}.")
    if open_result:
        open_file(html)


@command.command()
@click.option("--recipe", "recipes", multiple=True, help="Recipe to measure; repeatable. Default: every tiny one.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=options.Choice(["scenes", "training", "sampling", "evaluation", "cache", "opening", "released"]),
    help="What is measured; repeatable. Default: scenes, training, sampling and cache.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=options.Choice(["float32", "bf16", "fp16"]),
    help="Repeatable. Default: the recipe's own; for the part released float32 and bf16.",
)
@click.option(
    "--compile",
    "compiled",
    multiple=True,
    type=options.Choice(["no", "yes"]),
    help="Whether torch.compile compiles the blocks; repeatable. Default: no.",
)
@click.option("--batch", "batch_size", type=click.IntRange(min=1), help="Outputs at a time of the part sampling.")
@click.option("--small", is_flag=True, help="Frozen networks and comparisons of one layer, to try the command.")
@click.option("--output", type=options.PATH, help="JSON file to write, with a page (.md) beside it. Default: none.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def speed(
    recipes: Sequence[str], parts: Sequence[str], precisions: Sequence[str], compiled: Sequence[str],
    batch_size: int | None, small: bool, output: Path | None, overwrite: bool, overrides: Sequence[str],
) -> None:  # fmt: skip
    """Scenes rendered, training steps, outputs sampled, items evaluated and samples read per second on this machine.

    \b
      crossflow benchmark speed --part training --recipe t2i_tiny --compile no --compile yes
      crossflow benchmark speed --part sampling --recipe flowtok_xl --batch 64 data.image_size=256

    Rows are measured on the product's own calls: steps of a Trainer, calls of a Pipeline, an evaluation. Recipes with
    frozen networks get random ones of the public sizes, so nothing is downloaded. A row has the parts of the time,
    memory, utilisation (the share of the speed of a large matrix product), and what bounds it.

    The part `cache` reads a feature cache and, side by side, files as the released CrossFlow scripts write them (one
    pickle per sample): `clip` holds what a 256 px CLIP model needs, `all` everything those scripts put into a file;
    `cold` means read from the disk.

    The part `opening` opens lists of one and ten million pictures whose index exists, and measures the memory of a
    loader worker over 10,000 batches; building the indices takes some minutes.

    The part `released` alternates training steps and guided sampling with the released manner (two guidance passes,
    attention written out in float32, activations recomputed, an average in a Python loop, one file per sample) on the
    same weights, and checks that both compute the same. With --recipe, of these recipes.
    """
    import tempfile

    from crossflow.benchmarks.speed import run
    from crossflow.benchmarks.speed.page import page
    from crossflow.core.files import write_atomically

    check_output(output, overwrite=overwrite)
    choice = run.Choice(
        tuple(recipes) or tuple(f"{task}_tiny" for task in task_names()),
        tuple(overrides),
        tuple(precisions),
        tuple(value == "yes" for value in compiled) or (False,),
        batch_size,
        small,
        compared=bool(recipes),
    )
    where = "are printed alone, without --output" if output is None else f"go to {output}"
    say(f"Measuring {', '.join(parts or run.DEFAULT_PARTS)} of {', '.join(choice.recipes)}. Results {where}.")
    with tempfile.TemporaryDirectory(prefix="crossflow-speed-") as folder, progress_bar("measuring") as on_step:
        results = run.measure(choice, Path(folder), parts=parts or run.DEFAULT_PARTS, progress=on_step)
    for row in [row for part in run.PARTS for row in results.get(part, [])]:
        say("  ".join(f"{name} {value}" for name, value in row.items() if name != "longest_operators"))
    if output is not None:
        write_atomically(output, json.dumps(results, indent=1))
        write_atomically(output.with_suffix(".md"), page(results, shlex.join(["crossflow", *sys.argv[1:]])))
        say(f"Wrote {output} and {output.with_suffix('.md')}.")


@command.command()
@click.argument("arguments", nargs=-1, required=True, metavar="[LABEL:]RECIPE... [[LABEL:]KEY=VALUE]...")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Of steps, by the clock of an idle machine.")
@click.option(
    "--cpu-minutes",
    type=click.FloatRange(0, min_open=True),
    help="Instead of --minutes: of steps, in processor time of all threads, on a machine that others use too.",
)
@click.option("--points", default=4, show_default=True, type=click.IntRange(1), help="Scores during each training.")
@click.option("--num", default=240, show_default=True, type=click.IntRange(1), help="Items of each score.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Seeds 0, 1, ... of each recipe.")
@click.option(
    "--output", type=options.PATH, default=Path("learning"), show_default=True, help="Folder of runs and results."
)
def learning(
    arguments: Sequence[str], minutes: float | None, cpu_minutes: float | None, points: int, num: int, seeds: int,
    output: Path,
) -> None:  # fmt: skip
    """Which recipe learns fastest: trainings of equal time, and their scores against minutes.

    \b
      crossflow benchmark learning t2i_tiny t2i_small --minutes 5
      crossflow benchmark learning t2i_tiny adamw:t2i_tiny adamw:train.optimizer=adamw --cpu-minutes 8 --seeds 3

    KEY=VALUE holds for all recipes, LABEL:KEY=VALUE for one; a recipe without a label is its own. Each gets the number
    of steps that fit into the time at the speed of its first steps, so its schedule ends with the time; preparations
    (a caption's text autoencoder) and scores are not counted. The page (learning.html, learning.md, learning.png,
    learning.json) is rewritten after each training. After Ctrl-C the same command continues; further recipes and
    seeds may be added to it.
    """
    if (minutes is None) == (cpu_minutes is None):
        raise UserError("Give the time of each training, by either --minutes or --cpu-minutes.")
    from crossflow.benchmarks.learning import Budget, Clock, compare, entries

    clock: Clock = "minutes" if minutes is not None else "cpu minutes"
    budget = Budget(minutes or cpu_minutes or 0.0, clock, points, num, tuple(range(seeds)))
    markdown, html = compare(entries(arguments), budget, output, say, training_progress())
    say(f"Wrote {html} and {markdown}.")


@command.command()
@click.argument("recipe", type=options.RecipeName())
@click.option("--task", type=options.TaskNames(), help="The tasks, separated by commas. Default: all of the recipe.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Of steps of each side, by the clock.")
@click.option(
    "--cpu-minutes",
    type=click.FloatRange(0, min_open=True),
    help="Instead of --minutes: in processor time of all threads.",
)
@click.option("--num", default=240, show_default=True, type=click.IntRange(1), help="Items of each score.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Seeds 0, 1, ... of each training.")
@click.option(
    "--output", type=options.PATH, default=Path("joint"), show_default=True, help="Folder of runs and results."
)
@options.settings
def joint(
    recipe: str, task: str | None, minutes: float | None, cpu_minutes: float | None, num: int, seeds: int,
    output: Path, overrides: Sequence[str],
) -> None:  # fmt: skip
    """What tasks gain or lose by one backbone: a joint run beside runs of each task alone, in equal time.

    \b
      crossflow benchmark joint joint_tiny --minutes 20
      crossflow benchmark joint joint_tiny --task t2i,depth --cpu-minutes 30 --seeds 3 backbone.size=tiny

    The separate runs share the time of the joint one, once with the same network for each task, and once with narrower
    ones that together have as many parameters as the joint network. The page (joint.html, joint.md, joint.json) is
    written after each seed; after Ctrl-C the same command continues.
    """
    if (minutes is None) == (cpu_minutes is None):
        raise UserError("Give the time of each side, by either --minutes or --cpu-minutes.")
    from crossflow.benchmarks.joint import Budget, Comparison, compare

    clock = "minutes" if minutes is not None else "cpu minutes"
    budget = Budget(minutes or cpu_minutes or 0.0, clock, num, tuple(range(seeds)))
    comparison = Comparison(recipe, tuple(overrides), task, budget, output)
    markdown, html = compare(comparison, say, training_progress())
    say(f"Wrote {html} and {markdown}.")


@command.command()
@click.argument("runs", nargs=-1, required=True, type=options.PATH, metavar="RUN...")
@click.option("--steps", default="1,2,4,8", show_default=True, help="Numbers of steps, separated by commas.")
@click.option(
    "--deviations",
    default="0,0.5,1",
    show_default=True,
    help="Factors of the source's deviation, separated by commas; 0 is its mean.",
)
@click.option("--num", default=100, show_default=True, type=click.IntRange(1), help="Items of the validation split.")
@click.option(
    "--network",
    help="Also measure the distance in features of timm:NAME, timm:NAME=FILE or timm:NAME@random (untrained).",
)
@options.output_folder("perception")
@options.overwrite
def perception(
    runs: Sequence[Path], steps: str, deviations: str, num: int, network: str | None, output: Path | None,
    overwrite: bool,
) -> None:  # fmt: skip
    """Error against sharpness and feature distance, over the steps of sampling and the noise of the source.

    \b
      crossflow benchmark perception runs/sr_tiny --steps 1,4
      crossflow benchmark perception runs/depth_tiny --steps 1,2 --deviations 0,1 --num 20
      crossflow benchmark perception runs/a runs/b --network timm:vgg16=vgg16.safetensors

    For runs whose outputs have one truth (super-resolution, depth). Writes perception.md, .html and .json.
    """
    from crossflow.benchmarks.perception import Study
    from crossflow.benchmarks.perception import perception as write_page
    from crossflow.networks.picture_distances import FeatureDistance
    from crossflow.released.files import read_weights

    check_output(output, overwrite=overwrite)
    counts = tuple(map(int, _numbers("--steps", steps, 1, whole=True)))
    distance = None if network is None else FeatureDistance(network, read_weights)
    study = Study(counts, _numbers("--deviations", deviations, 0), num, distance=distance)
    with output_folder(Path("perception"), output, overwrite=overwrite) as folder:
        say(f"Sampling {num} items of {', '.join(map(str, runs))} in {steps} steps. The page goes to {folder}.")
        markdown, html = write_page(runs, study, folder, say)
    say(f"Wrote {html} and {markdown}.")


def _numbers(option: str, text: str, least: float, *, whole: bool = False) -> tuple[float, ...]:
    """The numbers of an option, separated by commas. Raises UserError for others, and for smaller ones."""
    try:
        numbers = tuple(int(word) if whole else float(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not min(numbers) >= least:
        kind = "whole numbers" if whole else "numbers"
        raise UserError(f"{option} takes {kind} of at least {least:g}, separated by commas; got {text!r}.")
    return numbers


@command.command()
@click.argument("runs", nargs=-1, type=options.PATH, metavar="[RUN]...")
@click.option("--recipe", "recipes", multiple=True, help="Recipe to train a few steps of. Default: every tiny one.")
@click.option("--output", type=options.PATH, help="JSON file to write. Default: none.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def agreement(runs: Sequence[Path], recipes: Sequence[str], output: Path | None, overwrite: bool) -> None:
    """Whether this machine's device computes what its CPU computes; fails if it does not.

    \b
      crossflow benchmark agreement runs/t2i runs/depth
      crossflow benchmark agreement --recipe depth_tiny

    Samples from runs on both, compares losses and gradients of recipes in float32 and bf16, and resumes a training.
    """
    import tempfile
    from dataclasses import asdict

    from crossflow.benchmarks.agreement import agreement as compare
    from crossflow.core.files import write_atomically
    from crossflow.engine.provenance import environment

    check_output(output, overwrite=overwrite)
    subjects = [*map(str, runs), *(recipes or (f"{task}_tiny" for task in task_names()))]
    say(f"Comparing the device with the CPU on {', '.join(subjects)}.")
    with tempfile.TemporaryDirectory(prefix="crossflow-agreement-") as folder:
        checks = compare(
            runs,
            recipes or [f"{task}_tiny" for task in task_names()],
            Path(folder),
            on_check=lambda check: say(
                f"{'agrees' if check.passes else 'DIFFERS'}  {check.subject}  {check.what}  "
                f"{check.difference:.2g} (limit {check.limit:g})"
            ),
        )
    if output is not None:
        rows = [{**asdict(check), "passes": check.passes} for check in checks]
        write_atomically(output, json.dumps({"checks": rows, **environment()}, indent=1))
        say(f"Wrote {output}.")
    failures = [f"{check.what} of {check.subject}" for check in checks if not check.passes]
    if failures:
        raise UserError(
            f"The device differs from the CPU in {', '.join(failures)}. Results of this machine cannot be trusted: "
            "check the driver and the version of torch, and report the difference."
        )


@command.command("plan")
@click.argument("recipe")
@click.option("--gpus", default="1,8,64,512", show_default=True, help="Numbers of GPUs, separated by commas.")
@click.option("--samples-per-second", type=float, required=True, help="Of one GPU (`crossflow benchmark speed`).")
@click.option("--network", type=float, default=50.0, show_default=True, help="GB/s that each GPU can send.")
@click.option("--disk", type=float, default=2.0, show_default=True, help="GB/s that all processes together can write.")
@options.settings
def plan_command(
    recipe: str, gpus: str, samples_per_second: float, network: float, disk: float, overrides: Sequence[str]
) -> None:
    """A training on many GPUs, on paper: memory, checkpoints, bytes on the wire, samples and tokens per second.

    \b
      crossflow benchmark plan t2i_256_clip_dimr --samples-per-second 120
      crossflow benchmark plan t2i_tiny --gpus 1,2,4 --samples-per-second 900 --network 10

    Each number of GPUs is planned unsharded and with train.sharding=fsdp.
    """
    from crossflow.benchmarks.scaling import Machines, scaling
    from crossflow.core.files import size_in_words
    from crossflow.tasks import load_config

    numbers = [int(word) for word in gpus.split(",") if word.strip().isdigit() and int(word) > 0]
    if len(numbers) != len(gpus.split(",")) or min(samples_per_second, network, disk) <= 0:
        raise UserError("--gpus takes positive numbers separated by commas, such as 1,8,64; the rates are positive.")
    config = load_config(recipe, overrides)
    rows = scaling(config, numbers, Machines(samples_per_second, network * 1e9, disk * 1e9))
    say(f"{recipe}: batch {config.train.batch_size}, {config.train.accumulate} accumulated part(s). Assumed:")
    say(f"- one GPU computes {samples_per_second:g} samples/s, sends {network:g} GB/s; checkpoints take {disk:g} GB/s;")
    say("- float32 weights and gradients, exchanged in rings; each GPU computes as fast as it does alone;")
    say("- rates lie between an exchange that waits for the computation and one that overlaps with it wholly;")
    say(f"- a sample has {rows[0].tokens} tokens of the backbone, those of all its resolutions.")
    if rows[0].activations is None:
        say("- without data: activations, frozen networks and learned parts of the losses come on top.")
    for row in rows:
        activations = "" if row.activations is None else f" + activations {size_in_words(row.activations)}"
        say(
            f"{row.gpus:>5} GPUs  {'fsdp' if row.sharded else 'none'}  state {size_in_words(row.state)}{activations}"
            f"  checkpoint {size_in_words(row.checkpoint)} in {row.checkpoint_seconds:.3g} s"
            f"  sent per step {size_in_words(row.sent)}  {row.slowest:.4g} to {row.fastest:.4g} samples/s"
            f"  {row.tokens * row.slowest:.3g} to {row.tokens * row.fastest:.3g} tokens/s"
        )
