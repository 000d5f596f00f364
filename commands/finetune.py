"""``crossflow finetune``: own pictures, learned by a trained run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crossflow.commands import options
from crossflow.commands.console import say
from crossflow.core.errors import UserError

if TYPE_CHECKING:
    from crossflow.core.config import Config


@click.command("finetune", short_help="Teach a trained run your own pictures.")
@click.argument("source", metavar="RUN")
@click.option("--data", required=True, help="Training data: folder:DIR, jsonl:FILE, ... (crossflow list datasets).")
@click.option("--output", type=options.PATH, help="New run directory. Default: runs/RUN_finetuned, numbered if taken.")
@click.option(
    "--method",
    type=options.Choice(["lora", "full", "parts"]),
    default="lora",
    show_default=True,
    help="lora: small matrices beside the weights; full: all weights; parts: those that --train and --freeze leave.",
)
@click.option("--rank", type=click.IntRange(1), help="Of lora. Default: the largest under 2 % of RUN's weights.")
@click.option(
    "--train", "train", multiple=True, metavar="PATTERN", help="Train the weights with such names; repeatable."
)
@click.option("--freeze", multiple=True, metavar="PATTERN", help="Keep the weights with such names; repeatable.")
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the samples from RUN's own data, lest it forget them. Default: 0.5 where they can be read.",
)
@click.option(
    "--features/--no-features",
    default=None,
    help="Compute the features of frozen networks once, beside --output. Default: for large models.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print what it takes: parameters, memory by part, disk; nothing is trained."
)
@options.settings
def command(
    source: str, data: str, output: Path | None, method: str, rank: int | None, train: Sequence[str],
    freeze: Sequence[str], keep: float | None, features: bool | None, dry_run: bool, overrides: Sequence[str],
) -> None:  # fmt: skip
    """Teach a trained RUN (a run directory, converted released weights, or a hub id) your own pictures.

    \b
      crossflow finetune runs/t2i_small --data folder:my_pictures
      crossflow sample --checkpoint runs/t2i_small_finetuned --prompt "a red cube" --adapter-scale 0.7
      crossflow finetune runs/t2i_small --data folder:my_pictures --rank 8 train.steps=1000
      crossflow finetune runs/t2i_small --data folder:my_pictures --method parts --train "source_encoder.*"
      crossflow finetune runs/t2i_small --data folder:my_pictures --method full data.image_size=64
      crossflow finetune runs/released --data jsonl:mine.jsonl --dry-run     what it takes, of memory above all
      crossflow export runs/t2i_small_finetuned merged --to run              a run without a base

    lora and parts store what they change alone; RUN stays where it is and is read along. A stopped training continues
    with `crossflow train --output DIR --resume auto`. KEY=VALUE overrides any setting. See docs/fine_tuning.md.
    """
    from crossflow.commands.doctor import examine_training
    from crossflow.commands.train import train_into
    from crossflow.core import distributed
    from crossflow.engine.finetune import Changes, finetuned
    from crossflow.engine.folder import new_folder
    from crossflow.networks.hub import short_name

    config = finetuned(source, data, Changes(method, rank, train, freeze, keep), overrides)
    distributed.limit_waiting(config.train.timeout_minutes, "train.timeout_minutes")
    distributed.device()  # joins the processes of a launcher, if there are several
    if dry_run:
        examine_training(source, config, config)
        return
    name = f"{short_name(source)}_finetuned"
    folder = output or distributed.on_main(lambda: new_folder(Path("runs"), name))
    if distributed.is_main():
        say(f"Using {source} ({config.task}) on {config.data.train}. The run goes to {folder}.")
        say(f"It is validated on {config.data.val or config.data.train}.")
    if config.train.offload if features is None else features:
        config = _with_features(config, folder)
    train_into(folder, config)


def _with_features(config: "Config", folder: Path) -> "Config":
    """The configuration for training on cached features of its data, which are computed beside `folder` first."""
    from crossflow.commands.cache import complete_cache
    from crossflow.core import distributed
    from crossflow.data.readers import joined_parts
    from crossflow.data.spec import split_forced
    from crossflow.engine import cache
    from crossflow.engine.sample import find_device
    from crossflow.tasks import task_class

    spec = config.data.train
    if spec.startswith("cache:") or not task_class(config.task).reads_features:
        return config
    if joined_parts(spec) is not None:
        raise UserError(
            f"Features are computed of one data set, and this is {spec}. Use --no-features, or --keep 0, or caches "
            "made by `crossflow cache`: --data '20 * cache:NEW + cache:OLD'."
        )
    cached = folder.with_name(f"{folder.name}_features")
    device = find_device(cache.own_device())
    builder = cache.builder(config, spec, cached, device=str(device), offload=device.type != "cpu")
    complete_cache(builder, cached)
    distributed.on_main(lambda: None)  # waits until all processes have done their part
    split = split_forced(spec)[1]
    place = f"cache:{cached.resolve()}" + (f"@{split}" if split else "")
    data = config.data.model_copy(update={"train": place})
    return config.model_copy(update={"data": data})
