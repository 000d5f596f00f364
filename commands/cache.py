"""``crossflow cache``."""

import os
from collections.abc import Sequence
from pathlib import Path

import click

from crossflow.commands.console import progress_bar, say, warn
from crossflow.core.errors import UserError


@click.command("cache")
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
def command(
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
    with progress_bar("caching") as on_step:
        summary = builder.run(on_step)
    for id, reason in list(summary.bad.items())[:20]:
        warn(f"skipped {id}: {reason}")
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

    with progress_bar("verifying") as on_step:
        report = verify(folder, on_step)
    problems, advice = report.problems, "Remove the .json files of these shards and cache again; the others are kept."
    if data is not None and not problems:
        with progress_bar("comparing with the data") as on_step:
            problems = caching.differences(folder, data, on_step)
        advice = "The data are not those that were cached: cache them again, in another folder."
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"The cache in {folder} has {len(problems)} problems:{listed}{more}\n{advice}")
    say(f"{folder} is as it was written: {report.num_items} items, {size_in_words(report.num_bytes)}.")
