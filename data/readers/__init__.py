"""Data by name: `open_reader("coco:DIR", "train")`. A new format is one file here and one line in the table below."""

import logging
from collections.abc import Collection
from pathlib import Path

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.registry import Registry
from crossflow.data.files import existing
from crossflow.data.reader import Reader
from crossflow.data.readers.cache import CacheReader
from crossflow.data.readers.coco import CocoReader
from crossflow.data.readers.flickr import FlickrReader
from crossflow.data.readers.folder import FolderReader
from crossflow.data.readers.hf import HfReader
from crossflow.data.readers.hypersim import HypersimReader
from crossflow.data.readers.joined import SEPARATOR, JoinedReader
from crossflow.data.readers.jsonl import JsonlReader
from crossflow.data.readers.karpathy import KarpathyReader
from crossflow.data.readers.kitti import KittiReader
from crossflow.data.readers.mjhq import MjhqReader
from crossflow.data.readers.npy import NpyReader
from crossflow.data.readers.nyu import NyuReader
from crossflow.data.readers.pairs import PairsReader
from crossflow.data.readers.picture_sets import (
    B100Reader,
    Div2kReader,
    ImagenetReader,
    Set5Reader,
    Set14Reader,
    Urban100Reader,
)
from crossflow.data.readers.prompts import PromptsReader
from crossflow.data.readers.scenes import ScenesReader
from crossflow.data.readers.skimage import SkimageReader
from crossflow.data.readers.wds import WdsReader
from crossflow.data.readers.zero_shot import DiodeReader, Eth3dReader, ScannetReader, VirtualKittiReader
from crossflow.data.spec import split_location
from crossflow.data.splits import SPLITS

logger = logging.getLogger(__name__)

READERS: Registry[type[Reader]] = Registry("data format")
READERS.register("scenes")(ScenesReader)
READERS.register("skimage")(SkimageReader)
READERS.register("pairs")(PairsReader)
READERS.register("coco")(CocoReader)
READERS.register("jsonl")(JsonlReader)
READERS.register("folder")(FolderReader)
READERS.register("cache")(CacheReader)
READERS.register("npy")(NpyReader)
READERS.register("prompts")(PromptsReader)
READERS.register("karpathy")(KarpathyReader)
READERS.register("flickr")(FlickrReader)
READERS.register("mjhq")(MjhqReader)
READERS.register("nyu")(NyuReader)
READERS.register("kitti")(KittiReader)
READERS.register("hypersim")(HypersimReader)
READERS.register("vkitti")(VirtualKittiReader)
READERS.register("eth3d")(Eth3dReader)
READERS.register("scannet")(ScannetReader)
READERS.register("diode")(DiodeReader)
READERS.register("imagenet")(ImagenetReader)
READERS.register("div2k")(Div2kReader)
READERS.register("set5")(Set5Reader)
READERS.register("set14")(Set14Reader)
READERS.register("b100")(B100Reader)
READERS.register("urban100")(Urban100Reader)
READERS.register("wds")(WdsReader)
READERS.register("hf")(HfReader)


def open_reader(
    spec: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
) -> Reader:
    """The items of a data set.

    Args:
        spec: `PREFIX:PLACE` (`coco:DIR`), `scenes`, `skimage`, or the bare path of data that can be recognised.
            `@train`, `@val`, `@test` or `@all` behind it takes that split whichever one is asked for:
            `folder:Set5@all` validates on all of a small set. Settings of the format come behind a question mark,
            before that: `kitti:DIR?crop=eigen&cap=none@test`. Several data sets are joined by a plus between spaces:
            `hypersim:DIR + vkitti:DIR`.
        split: train, val, test, or all.
        image_size: side in pixels at which scenes are rendered (default 64); files keep their own size.
        limit: at most that many items; of files a choice keyed by `seed`, spread over the split.
        seed: decides nothing but which items `limit` keeps. Splits never depend on it, so that no run trains on what
            another one tests on.

    Raises:
        UserError: unknown prefix, nothing at the place, a layout that does not fit, or no item in the split.
    """
    asked, spec = spec, spec.strip()
    if SEPARATOR in spec and existing(spec) is None:
        parts = [open_reader(part, split, image_size=image_size) for part in spec.split(SEPARATOR)]
        return JoinedReader(parts, limit, seed)
    place, at, forced = spec.rpartition("@")
    if at and forced in SPLITS and existing(spec) is None:
        spec, split = place, forced
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1 item.")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1 pixel.")
    prefix, colon, location = spec.partition(":")
    if prefix not in READERS.names() or not (colon or _is_embedded(prefix)):
        prefix, location = _recognise(spec, asked)
    return READERS.get(prefix)(location, split, image_size=image_size, limit=limit, seed=seed)


def located(spec: str, folder: Path, *, here_first: bool = True) -> str:
    """`spec` with its relative place taken from `folder`, if there is something.

    here_first: only when there is nothing at the place from here.
    """
    if SEPARATOR in spec and existing(spec) is None:
        return SEPARATOR.join(located(part, folder, here_first=here_first) for part in spec.split(SEPARATOR))
    place, at, forced = spec.strip().rpartition("@")
    split = f"@{forced}" if at and forced in SPLITS else ""
    place = place if split else spec.strip()
    prefix, colon, location = place.partition(":")
    if prefix in READERS.names() and (not colon or _is_embedded(prefix)):
        return spec
    before = f"{prefix}:" if prefix in READERS.names() else ""
    location, settings = split_location(location if before else place)
    there = existing(str(folder / location)) if location else None
    if there is None or (here_first and existing(location) is not None):
        return spec
    return f"{before}{there}{'?' if settings else ''}{settings}{split}"


def require(reader: Reader, fields: Collection[str], task: str) -> Reader:
    """`reader` as `task` needs it, which is what the task must go on with: every good item has all of `fields`.

    Raises UserError when the data lack one of `fields` altogether. Single items that lack one are bad items then.
    """
    missing = [field for field in fields if field not in reader.fields]
    if not missing:
        return reader.having(fields)
    reasons = [f"{id}: {reason}" for id, reason in reader.problems.items()]
    if len(reasons) == len(reader):
        raise UserError(f"All {len(reader)} items of {reader.spec!r} are bad, such as {'; '.join(reasons[:3])}.")
    fitting = [name for name in READERS.names() if READERS.get(name).offers.issuperset(fields)]
    raise UserError(
        f"Task {task!r} needs {_listed(fields)}, but {reader.spec!r} (split {reader.split!r}) has only "
        f"{_listed(reader.fields)}: no {_listed(missing)}. "
        f"Formats that can hold what it needs: {', '.join(fitting) or 'none'}."
    )


def _listed(fields: Collection[str]) -> str:
    return " and ".join(sorted(fields)) or "nothing readable"


def _is_embedded(prefix: str) -> bool:
    return READERS.get(prefix).embedded


def _recognise(spec: str, asked: str) -> tuple[str, str]:
    """(prefix, location) for the bare path `spec`; raises UserError when it is no path or looks like nothing known."""
    path = existing(spec) if spec else None
    if path is None:
        prefix, colon, _ = spec.partition(":")
        if prefix in READERS.names():
            raise UserError(f"{asked!r} names no place: write {prefix}:PATH with {READERS.get(prefix).layout}.")
        problem = unknown_name("data format", prefix if colon else spec, READERS.names())
        raise UserError(f"{problem} A path without a format in front must exist; {spec!r} does not.")
    for prefix in sorted(READERS.names(), key=lambda name: name == "folder"):  # any image makes a folder, so it is last
        found = READERS.get(prefix).recognise(path)
        if found and prefix == "folder":
            _refuse_a_collection(path, asked)
        if found:
            logger.warning("Reading %s as '%s:%s', because of %s.", spec, prefix, spec, found)
            return prefix, spec
    content = sorted(child.name for child in path.iterdir())[:5] if path.is_dir() else [path.name]
    layouts = "; ".join(f"{name}: for {READERS.get(name).layout}" for name in READERS.names() if not _is_embedded(name))
    raise UserError(
        f"{asked!r} looks like no known data ({', '.join(content) or 'it is empty'}). "
        f"Write the format in front of it: {layouts}."
    )


def _refuse_a_collection(path: Path, asked: str) -> None:
    """A folder whose sub-folders are data sets of their own is not one folder of images."""
    inner = [
        f"{prefix}:{child}"
        for child in sorted(path.iterdir())
        for prefix in READERS.names()
        if child.is_dir() and prefix != "folder" and READERS.get(prefix).recognise(child)
    ]
    if inner:
        raise UserError(
            f"{asked!r} holds several data sets: write one of {', '.join(inner)}, or folder:{path} for all its images."
        )
