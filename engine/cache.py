"""Feature caches: the builder for a recipe and a data set, and the comparison of a cache with its data."""

from collections.abc import Sequence
from pathlib import Path

import torch

from crossflow.core import launcher
from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.precision import check_precision
from crossflow.core.progress import Progress
from crossflow.data.cache.build import Builder, Settings
from crossflow.data.cache.extract import Options
from crossflow.data.cache.store import Cache
from crossflow.data.cache.verify import compare
from crossflow.data.reader import Reader
from crossflow.data.readers import open_reader, require
from crossflow.tasks import task_class

USUAL_SPLITS = ("train", "val")


def builder(
    config: Config,
    spec: str,
    folder: Path,
    *,
    splits: Sequence[str] = (),
    sizes: Sequence[int] = (),
    storage: str = "float16",
    device: str = "cpu",
    precision: str = "float32",
    compile: bool = False,
    offload: bool = False,
    num: int | None = None,
    settings: Settings | None = None,
) -> Builder:
    """The builder of a cache of the data `spec` for the recipe `config` in `folder`; nothing is computed or written
    yet.

    Args:
        splits: to cache; by default train, and val if the data have one.
        sizes: of pictures in pixels; by default the recipe's.
        storage: number format of features on disk.
        device, precision, compile, offload: where and how the frozen networks compute, as for `crossflow.load`. A cache
            serves many trainings on many machines, so its precision is float32 unless set, also on a GPU.
        num: maximum number of items of each split.
        settings: shard size, batch size and workers; by default with the recipe's data.max_bad.

    Raises UserError if data, recipe and folder do not fit together.
    """
    sizes = tuple(dict.fromkeys(sizes)) or (config.data.image_size,)
    readers, limits = _readers(config, spec, splits, max(sizes), num)
    fields = frozenset.intersection(*(reader.fields for reader in readers.values()))
    if "features" in fields:
        raise UserError(f"{spec!r} is already a cache. Give the data it was made from.")
    imported = "released" in fields
    task = task_class(config.task).frozen(config)
    check_precision(precision, torch.device(device))
    images = imported or "image" in fields
    extractor = task.extractor(Options(sizes, storage, device, precision, compile, offload, images))
    needs = {"captions", "released"} if imported else extractor.needs
    readers = {split: require(reader, needs, f"{config.task} (cache)") for split, reader in readers.items()}
    result = Builder(folder, readers, extractor, settings or Settings(max_bad=config.data.max_bad), limits)
    result.compare_imported()
    return result


def _readers(
    config: Config, spec: str, splits: Sequence[str], size: int, num: int | None
) -> tuple[dict[str, Reader], dict[str, tuple[int | None, int]]]:
    """split -> reader, and split -> (limit, seed). A spec that names its split (`coco:DIR@all`) gives that alone."""
    readers: dict[str, Reader] = {}
    limits: dict[str, tuple[int | None, int]] = {}
    for split in dict.fromkeys(splits or USUAL_SPLITS):
        limit = num if num is not None else config.data.num_train if split == "train" else None
        try:
            reader = open_reader(spec, split, image_size=size, limit=limit, seed=config.seed)
        except UserError:
            if splits or not readers:  # requested, or even train is missing
                raise
            continue
        if reader.split not in readers:
            readers[reader.split], limits[reader.split] = reader, (limit, config.seed)
    return readers, limits


def own_device() -> str | None:
    """`cuda:N`, the GPU of this process, when a launcher started several processes; None otherwise or without a GPU."""
    import torch

    if launcher.world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{launcher.local_rank() % torch.cuda.device_count()}"
    return None


def differences(folder: Path, spec: str, progress: Progress | None = None) -> list[str]:
    """How the content of the data `spec` differs from the cache in `folder` made from them; empty if it does not."""
    cache = Cache(folder)
    sizes = [int(name.partition("_")[2]) for name in cache.features["parts"] if name.startswith("moments")]
    readers = {
        split: open_reader(spec, split, image_size=max(sizes, default=None), limit=plan["limit"], seed=plan["seed"])
        for split, plan in cache.plan["data"].items()
    }
    return compare(folder, readers, progress).problems
