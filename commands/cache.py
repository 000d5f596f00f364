"""``crossflow cache``: features of a data set, computed once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crossflow.commands import options
from crossflow.commands.console import is_first_process, progress_bar, say, warn_each
from crossflow.core.errors import UserError

if TYPE_CHECKING:
    from crossflow.data.cache.build import Builder, Estimate


@click.command("cache", short_help="Compute features of data by frozen networks once.")
@click.option(
    "--config",
    "recipe",
    type=options.RecipeName(),
    help="Recipe to be trained from the cache: shipped name, YAML file or run directory.",
)
@click.option("--data", help="jsonl:FILE, coco:DIR, folder:DIR, prompts:FILE, npy:DIR, ... (crossflow list datasets).")
@click.option("--output", type=options.PATH, help="Folder of the cache; an unfinished cache there is continued.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=options.ANY_SPLIT,
    help="Split to cache; repeatable. Default: train, and val where the data have one.",
)
@click.option(
    "--resolution",
    "sizes",
    multiple=True,
    type=click.IntRange(4, 4096),
    help="Side of the pictures in pixels; repeatable. Default: the recipe's data.image_size.",
)
@click.option(
    "--storage",
    default="float16",
    show_default=True,
    type=options.Choice(["float16", "bfloat16", "float32"]),
    help="Type that features are stored in.",
)
@click.option("--num", type=click.IntRange(1), help="Maximum number of items per split.")
@click.option(
    "--batch",
    "--batch-size",
    "batch_size",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Items encoded together.",
)
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Threads that decode pictures.")
@click.option(
    "--shard-items",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="Items per file; a killed run repeats at most this many.",
)
@options.device
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    type=click.Choice(list(options.PRECISIONS)),
    help="Of matrix products; recorded in the cache, which many trainings may read.",
)
@options.compile
@options.offload
@click.option("--dry-run", is_flag=True, help="Print the expected size; nothing is written.")
@click.option(
    "--verify",
    "verified",
    type=options.PATH,
    help="Check the cache in this folder instead; with --data, also whether pictures or captions have changed.",
)
@options.settings
def command(
    recipe: str | None, data: str | None, output: Path | None, dry_run: bool, verified: Path | None,
    overrides: Sequence[str], **encoding: Any,
) -> None:  # fmt: skip
    """Compute the features of a data set by frozen networks once, so that training only reads them.

    The cache holds the moments of pictures (each epoch draws a new latent from them), the features of all captions
    without padding, and the alignment target of the recipe's encoder loss: embeddings of the image tower, or small
    pictures.

    \b
      crossflow cache --config t2i_256_clip_dimr --data jsonl:jdb/img_text_pair.jsonl --output cached \\
        text.encoder=openai/clip-vit-large-patch14 codec.source=stabilityai/sd-vae-ft-ema
      crossflow train --config t2i_256_clip_dimr --data cache:cached text.encoder=... codec.source=...
      crossflow cache --config mine.yaml --data coco:coco2014 --output cached --resolution 256 --resolution 512
      crossflow cache --config mine.yaml --data npy:jdb --output cached     feature files of the released scripts
      crossflow cache --config mine.yaml --data coco:coco2014 --output cached --precision bf16 --compile --batch 128
      crossflow cache --verify cached

    A killed run continues when the same command is given again, and ends with the same bytes. Several processes share
    the work under torchrun or accelerate launch. A cache is bound to the weights of its networks: training refuses one
    made with others.
    """
    if verified is not None:
        _verify(verified, data)
        return
    if recipe is None or data is None or output is None:
        needed = {"--config": recipe, "--data": data, "--output": output}
        missing = [name for name, value in needed.items() if value is None]
        raise UserError(f"A cache needs {' and '.join(missing)}; see `crossflow cache --help`.")
    builder = _builder(recipe, data, output, overrides, encoding)
    expected = builder.estimate()
    _show_plan(builder, expected, output)
    expected.require(output)
    if not dry_run:
        complete = complete_cache(builder, output)
        if complete and any("moments" in part for part in builder.extractor.describe()["parts"]):
            _say(f"Train on it: crossflow train --config {recipe} --data cache:{output} {' '.join(overrides)}".rstrip())


def _say(text: str) -> None:
    """Processes of a launcher share the work without waiting for each other; the first one prints for all."""
    if is_first_process():
        say(text)


def _builder(recipe: str, data: str, output: Path, overrides: Sequence[str], encoding: dict[str, Any]) -> "Builder":
    """The builder of the cache; encoding: the options of the command that say how it is computed."""
    from crossflow.data.cache.build import Settings
    from crossflow.engine import cache
    from crossflow.engine.sample import find_device
    from crossflow.tasks import load_config

    config = load_config(recipe, overrides)
    return cache.builder(
        config,
        data,
        output,
        splits=encoding["splits"],
        sizes=encoding["sizes"],
        storage=encoding["storage"],
        device=str(find_device(encoding["device"] or cache.own_device())),
        precision=encoding["precision"],
        compile=encoding["compile"],
        offload=encoding["offload"],
        num=encoding["num"],
        settings=Settings(encoding["shard_items"], encoding["batch_size"], encoding["workers"], config.data.max_bad),
    )


def _show_plan(builder: "Builder", expected: "Estimate", output: Path) -> None:
    from crossflow.core.files import size_in_words

    counts = ", ".join(f"{len(reader)} {split}" for split, reader in builder.readers.items())
    parts = ", ".join(builder.extractor.describe()["parts"])
    _say(
        f"{counts} items, {parts}: about {size_in_words(expected.num_bytes)} "
        f"({size_in_words(expected.bytes_per_item)} per item) in {output}; {size_in_words(expected.free)} are free."
    )
    if expected.finished:
        _say(f"Continuing: {size_in_words(expected.finished)} are cached already.")


def complete_cache(builder: "Builder", output: Path) -> bool:
    """Builds the cache; returns whether it is complete, which only the last of several processes can see."""
    from crossflow.core.files import size_in_words

    with progress_bar("caching") as on_step:
        summary = builder.run(on_step)
    warn_each([f"skipped {id}: {reason}" for id, reason in summary.bad.items()], "in the .json files of the cache")
    _say(
        f"{'Cached' if summary.complete else 'Cached so far'} {summary.num_items} items "
        f"({summary.new_items} new, {len(summary.bad)} skipped), {size_in_words(summary.num_bytes)} in {output}."
    )
    return bool(summary.complete)


def _verify(folder: Path, data: str | None) -> None:
    """Raises UserError with the problems of a cache, or with its differences from the data it was made from."""
    from crossflow.core.files import size_in_words
    from crossflow.data.cache.verify import verify
    from crossflow.engine import cache

    with progress_bar("verifying") as on_step:
        report = verify(folder, on_step)
    problems, advice = report.problems, "Remove the .json files of these shards and cache again; the others are kept."
    if data is not None and not problems:
        with progress_bar("comparing with the data") as on_step:
            problems = cache.differences(folder, data, on_step)
        advice = "The data differ from those that were cached: cache them again, in another folder."
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"The cache in {folder} has {len(problems)} problems:{listed}{more}\n{advice}")
    say(f"{folder} is intact: {report.num_items} items, {size_in_words(report.num_bytes)}.")
