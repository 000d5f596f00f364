"""Data by name: `open_reader("coco:DIR", "train")`. A format is one file in this folder and one line in the table."""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PureWindowsPath

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
from crossflow.data.spec import split_forced, split_location
from crossflow.data.splits import SPLITS

logger = logging.getLogger(__name__)

_REPEATED = re.compile(r"(?:([1-9][0-9]*) \* )?(.*)", re.DOTALL)
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

    >>> open_reader("scenes", "test", image_size=16, limit=2).ids
    ['test/000000', 'test/000001']

    Args:
        spec: `PREFIX:LOCATION` (`coco:DIR`), `scenes`, `skimage`, or the bare path of data in a recognisable format.
            A final `@train`, `@val`, `@test` or `@all` overrides `split`: `folder:Set5@all` validates on all of a
            small set. Options of the format come before that, after a question mark: `kitti:DIR?crop=eigen@test`.
            Data sets are joined by a plus between spaces: `hypersim:DIR + vkitti:DIR`.
        split: train, val, test, or all.
        image_size: side in pixels at which scenes are rendered (default 64); files keep their own size.
        limit: maximum number of items; files are chosen by a hash keyed by `seed`, spread over the split.
        seed: decides only which items `limit` keeps. Splits never depend on it, so that no run trains on what
            another one tests on.

    Raises:
        UserError: unknown prefix, missing location, unknown layout, or no item in the split.
    """
    if (parts := joined_parts(spec)) is not None:
        readers = [(times, open_reader(part, split, image_size=image_size)) for times, part in parts]
        return JoinedReader([reader for times, reader in readers for _ in range(times)], limit, seed)
    location, forced = split_forced(spec)
    split = forced or split
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1 item.")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1 pixel.")
    prefix, location = _parse(location) or _recognise(location, spec)
    return READERS.get(prefix)(location, split, image_size=image_size, limit=limit, seed=seed)


def joined_parts(spec: str) -> list[tuple[int, str]] | None:
    """The data sets that `SPEC + N * SPEC` joins, each with the number of times that it is read; None for a single one.

    >>> joined_parts("20 * folder:mine + scenes")
    [(20, 'folder:mine'), (1, 'scenes')]
    """
    matches = [_REPEATED.fullmatch(part) for part in spec.split(SEPARATOR)]
    if (len(matches) == 1 and not (matches[0] and matches[0][1])) or existing(spec) is not None:
        return None
    return [(int(match[1] or 1), match[2]) for match in matches if match]


def resolve_spec(spec: str, folder: Path, *, prefer_current: bool = True) -> str:
    """`spec` with its relative path taken from `folder`, if something exists there; otherwise unchanged.

    prefer_current: also unchanged if the path exists relative to the current folder.
    """
    if (parts := joined_parts(spec)) is not None:
        resolved = ((times, resolve_spec(part, folder, prefer_current=prefer_current)) for times, part in parts)
        return SEPARATOR.join(f"{times} * {part}" if times > 1 else part for times, part in resolved)
    rest, split = split_forced(spec)
    parsed = _parse(rest)
    if parsed is not None and _is_embedded(parsed[0]):
        return spec
    prefix, location = parsed or ("", rest)
    location, options = split_location(location)
    path = existing(str(folder / location)) if location else None
    if path is None or (prefer_current and existing(location) is not None):
        return spec
    return (f"{prefix}:" if prefix else "") + str(path) + (f"?{options}" if options else "") + (split and f"@{split}")


def with_options(spec: str, options: Mapping[str, str]) -> str:
    """`spec` with those of the settings `options` that its format knows and that it does not set itself."""
    prefix, colon, _ = spec.partition(":")
    if not colon or prefix not in READERS.names():
        return spec
    place, at, split = spec.rpartition("@")
    place, at, split = (place, at, split) if split in SPLITS else (spec, "", "")
    place, _, settings = place.partition("?")
    names = {setting.partition("=")[0] for setting in settings.split("&")}
    known = READERS.get(prefix).options
    added = [f"{name}={value}" for name, value in options.items() if name in known and name not in names]
    if not added:
        return spec
    return f"{place}?{'&'.join([*filter(None, [settings]), *added])}{at}{split}"


def require(reader: Reader, fields: Collection[str], task: str) -> Reader:
    """The data as `task` needs them: an item without one of `fields` is bad.

    Raises UserError when the data lack one of `fields` altogether.
    """
    missing = [field for field in fields if field not in reader.fields]
    if not missing:
        return reader.with_required(fields)
    reasons = [f"{id}: {reason}" for id, reason in reader.problems.items()]
    if len(reasons) == len(reader):
        raise UserError(f"All {len(reader)} items of {reader.spec!r} are bad, such as {'; '.join(reasons[:3])}.")
    suitable = [name for name in READERS.names() if READERS.get(name).offers.issuperset(fields)]
    raise UserError(
        f"Task {task!r} needs {_join(fields)}, but {reader.spec!r} (split {reader.split!r}) has only "
        f"{_join(reader.fields)}: no {_join(missing)}. "
        f"Formats that can provide them: {', '.join(suitable) or 'none'}."
    )


def _join(fields: Collection[str]) -> str:
    return " and ".join(sorted(fields)) or "nothing readable"


def _is_embedded(prefix: str) -> bool:
    return READERS.get(prefix).embedded


def _parse(spec: str) -> tuple[str, str] | None:
    """(prefix, location) of `PREFIX:LOCATION`, or of the bare prefix of embedded data; None for anything else."""
    prefix, colon, location = spec.partition(":")
    is_format = prefix in READERS.names() and bool(colon or _is_embedded(prefix))
    return (prefix, location) if is_format else None


def _recognise(location: str, spec: str) -> tuple[str, str]:
    """(prefix, location) for a bare path, the location of `spec`. Raises UserError when it is not recognisable."""
    path = existing(location) if location else None
    if path is None:
        prefix, colon, _ = location.partition(":")
        if prefix in READERS.names():
            raise UserError(f"{spec!r} has no location: write {prefix}:PATH with {READERS.get(prefix).layout}.")
        if PureWindowsPath(location).drive:  # C: is no format
            raise UserError(f"{location!r} does not exist. Give the path of your data, or FORMAT:PATH.")
        problem = unknown_name("data format", prefix if colon else location, READERS.names())
        raise UserError(f"{problem} A spec without a format must be an existing path, and {location!r} is not.")
    for prefix in sorted(READERS.names(), key=lambda name: name == "folder"):  # any image makes a folder, so it is last
        evidence = READERS.get(prefix).recognise(path)
        if evidence and prefix == "folder":
            _refuse_a_collection(path, spec)
        if evidence:
            logger.warning("Reading %s as '%s:%s', because it has %s.", location, prefix, location, evidence)
            return prefix, location
    content = sorted(child.name for child in path.iterdir())[:5] if path.is_dir() else [path.name]
    layouts = "; ".join(f"{name}: for {READERS.get(name).layout}" for name in READERS.names() if not _is_embedded(name))
    raise UserError(
        f"{spec!r} is in no recognisable format ({', '.join(content) or 'it is empty'}). "
        f"Write the format before the path: {layouts}."
    )


def _refuse_a_collection(path: Path, spec: str) -> None:
    """A folder whose sub-folders are data sets of their own is not one folder of images."""
    inner = [
        f"{prefix}:{child}"
        for child in sorted(path.iterdir())
        for prefix in READERS.names()
        if child.is_dir() and prefix != "folder" and READERS.get(prefix).recognise(child)
    ]
    if inner:
        raise UserError(
            f"{spec!r} holds several data sets: write one of {', '.join(inner)}, or folder:{path} for all its images."
        )
