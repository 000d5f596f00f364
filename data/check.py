"""Inspection of a data set: counts, sizes, captions, depth, bad items with reasons, and a sheet of its pictures.

Every item is read once and none is stored, so data sets of any size can be inspected.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.core.errors import UserError
from crossflow.core.progress import Progress
from crossflow.data.dataset import check
from crossflow.data.item import Item
from crossflow.data.reader import Reader
from crossflow.data.readers import open_reader

logger = logging.getLogger(__name__)

CELL = 160  # side of a picture in the sheet, pixels
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Inspection:
    """The result for one split."""

    spec: str
    split: str
    total: int
    good: int
    fields: tuple[str, ...]
    fingerprint: str
    numbers: dict[str, str]
    """name -> formatted value, for a table."""
    bad: dict[str, str]
    """id -> reason."""
    sheet: np.ndarray | None = None
    """uint8 (H, W, 3); None without pictures."""

    def describe(self) -> dict[str, Any]:
        """Everything but the sheet, in JSON types."""
        names = ("spec", "split", "total", "good", "fields", "fingerprint", "numbers", "bad")
        return {name: getattr(self, name) for name in names}


@dataclass
class _Statistics:
    """Statistics accumulated item by item. `shown`: ids of the items on the sheet."""

    shown: set[str]
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    num_captions: Counter[int] = field(default_factory=Counter)
    words: list[int] = field(default_factory=list)
    depths: list[tuple[float, float, float, float]] = field(default_factory=list)  # nearest, median, farthest, measured
    tiles: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def add(self, item: Item) -> None:
        if item.image is not None:
            self.sizes[item.image.shape[0], item.image.shape[1]] += 1
        self.num_captions[len(item.captions)] += 1
        self.words += [len(caption.split()) for caption in item.captions]
        if item.depth is not None:
            measured = item.depth[item.depth > 0]
            if measured.size:
                near, middle, far = (float(value) for value in np.percentile(measured, (0, 50, 100)))
                self.depths.append((near, middle, far, measured.size / item.depth.size))
            else:
                self.depths.append((np.nan, np.nan, np.nan, 0.0))
        if item.id in self.shown and item.image is not None:
            self.tiles.append((_tile(item), item.captions[0] if item.captions else item.id))

    def numbers(self) -> dict[str, str]:
        numbers: dict[str, str] = {}
        if self.sizes:
            for name, axis in (("height", 0), ("width", 1)):
                numbers[name] = _spread(np.repeat([size[axis] for size in self.sizes], list(self.sizes.values())), "px")
        if self.words:
            each = ", ".join(f"{count} with {number}" for number, count in sorted(self.num_captions.items())[:5])
            numbers["captions"] = f"{len(self.words)} ({each})"
            numbers["words per caption"] = _spread(np.array(self.words))
        if self.depths:
            nearest, median, farthest, measured = np.array(self.depths).T
            if measured.any():
                numbers["depth"] = (
                    f"{np.nanmin(nearest):.2f} to {np.nanmax(farthest):.2f} m, median {np.nanmedian(median):.2f} m"
                )
            numbers["measured pixels"] = f"{measured.mean():.1%} ({int((measured == 0).sum())} items without any)"
        return numbers


def inspect(reader: Reader, *, num_shown: int = 24, progress: Progress | None = None) -> Inspection:
    """Reads all items of a reader; `num_shown` of them, spread evenly, are on the sheet."""
    places = np.unique(np.linspace(0, len(reader) - 1, min(num_shown, len(reader))).astype(int))
    statistics = _Statistics({reader.ids[int(place)] for place in places} if num_shown else set())
    report = check(reader, progress, statistics.add)
    return Inspection(
        spec=reader.spec,
        split=reader.split,
        total=report.total,
        good=report.good,
        fields=tuple(sorted(reader.fields)),
        fingerprint=reader.fingerprint(),
        numbers=statistics.numbers(),
        bad=report.bad,
        sheet=_sheet(statistics.tiles, f"{reader.spec} ({reader.split})"),
    )


def open_splits(
    spec: str, splits: Sequence[str] = (), *, image_size: int | None = None, limit: int | None = None
) -> dict[str, Reader]:
    """split -> reader, of `splits`, or else of those of train, val and test that the data have.

    Raises UserError when one of `splits`, or else every split, is unavailable.
    """
    readers, errors = {}, []
    for split in splits or SPLITS:
        try:
            reader = open_reader(spec, split, image_size=image_size, limit=limit)
            readers[reader.split] = reader  # a split in the spec, such as `@all`, overrides this one
        except UserError as error:
            errors.append(error)
            if splits:
                raise
    if not readers:
        raise errors[0]
    return readers


def shared_ids(readers: Mapping[str, Reader]) -> dict[tuple[str, str], list[str]]:
    """(split, other split) -> the ids in both, for pairs that share any."""
    sets = {split: set(reader.ids) for split, reader in readers.items()}
    pairs = [(first, second) for first in sets for second in sets if first < second]
    return {pair: sorted(both) for pair in pairs if (both := sets[pair[0]] & sets[pair[1]])}


def write(inspection: Inspection, folder: Path) -> list[Path]:
    """Writes SPLIT.json, the sheet SPLIT.png and, if any item is bad, SPLIT_bad.tsv; returns the files.

    Raises UserError when `folder` already has files of this split, which would be mixed with these.
    """
    from crossflow.core.files import write_atomically
    from crossflow.data.images import save_png

    name = inspection.split
    bad = folder / f"{name}_bad.tsv"
    present = [file.name for file in (folder / f"{name}.json", folder / f"{name}.png", bad) if file.exists()]
    if present:
        raise UserError(f"{folder} already has {', '.join(present)}. Choose a folder without results of {name!r}.")
    files = [write_atomically(folder / f"{name}.json", json.dumps(inspection.describe(), indent=1) + "\n")]
    if inspection.sheet is not None:
        files.append(save_png(inspection.sheet, folder / f"{name}.png", {"spec": inspection.spec, "split": name}))
    if inspection.bad:
        lines = ("\t".join(" ".join(text.split()) for text in pair) for pair in inspection.bad.items())
        files.append(write_atomically(bad, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")))
    return files


def _tile(item: Item) -> np.ndarray:
    """A small picture of an item with its depth beside or below it, uint8 (h, w, 3)."""
    from crossflow.data.resize import center_crop_resize
    from crossflow.data.sheet import colour_depth

    assert item.image is not None
    height, width = item.image.shape[:2]
    ratio = min(1, CELL / max(height, width))
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    picture = center_crop_resize(item.image, size)
    if item.depth is None:
        return picture
    near = center_crop_resize(item.depth, size, resample="nearest")
    sides = [picture, colour_depth(near)]
    return np.concatenate(sides, axis=1 if height > width else 0)  # closer to a square


def _sheet(tiles: Sequence[tuple[np.ndarray, str]], title: str) -> np.ndarray | None:
    from crossflow.data.sheet import sheet

    if not tiles:
        return None
    pictures, captions = zip(*tiles, strict=True)
    return sheet(
        pictures, captions, cell=CELL * 2 if any(len(picture) > CELL for picture in pictures) else CELL, title=title
    )


def _spread(values: np.ndarray, unit: str = "") -> str:
    low, middle, high = np.percentile(values, (0, 50, 100))
    unit = f" {unit}" if unit else ""
    return f"{low:g}{unit}" if low == high else f"{low:g} to {high:g}{unit}, median {middle:g}"
