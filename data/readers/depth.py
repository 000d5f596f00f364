"""What the readers of depth benchmarks share: the crop and the cap of their tables, and lists of pairs.

Where a benchmark scores part of a picture, depth outside of it is 0 (no measurement) in the items of `val` and `test`,
at the size of the files: so it stays outside when a task cuts or resizes the picture afterwards.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.files import with_links
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.spec import Option, Options

CROPS = {  # top, bottom, left, right, as shares of height and width
    "none": (0.0, 1.0, 0.0, 1.0),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),  # KITTI, Eigen et al. 2014
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),  # KITTI, Garg et al. 2016
    "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),  # Eigen's crop of NYU Depth V2, inside its white border
}


def scored(depth: np.ndarray, crop: str = "none", cap: float | None = None) -> np.ndarray:
    """float32 (H, W) metres with 0 outside the named crop, and where depth is `cap` metres or more."""
    height, width = depth.shape
    top, bottom, left, right = CROPS[crop]
    inside = np.zeros(depth.shape, dtype=bool)
    inside[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
    if cap is not None:
        inside &= depth < cap
    return np.where(inside, depth, 0).astype(np.float32)


def crop_option(default: str, *others: str) -> Option:
    return Option("the part that val and test score", default, tuple(dict.fromkeys((default, *others, "none"))))


def cap_option(default: str) -> Option:
    return Option("metres from which on val and test score nothing", default, number=True)


LIST = Option("text file with a picture and its depth on each line, instead of the splits", is_place=True)


class DepthReader(FileReader):
    """Pictures with depth. A subclass gives `list_pairs`, and `read_pair` where depth is no PNG in millimetres."""

    offers = frozenset(("image", "depth"))
    options: ClassVar[Options] = {"list": LIST, "cap": cap_option("none")}
    bases: ClassVar[tuple[str, ...]] = ()  # folders below the place from which lists name files, besides the place

    def listing(self, path: Path, split: str) -> Listing:
        file = self.place("list", path if path.is_dir() else path.parent)
        if file is None:
            return self.list_pairs(path, split)
        return Listing(path, listed_pairs(file, Bases(path, self.bases)), with_links(path))

    @abstractmethod
    def list_pairs(self, path: Path, split: str) -> Listing:
        """As `listing`, of data without a list of pairs."""

    def read(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        image, depth = self.read_pair(record)
        depth = np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
        if self.split in ("val", "test"):
            depth = scored(depth, self.option.get("crop", "none"), self.number("cap"))
        return image, depth

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The picture, and its depth in metres; what is not finite or not above 0 is no measurement."""
        image, depth = super().read(record)
        assert depth is not None
        return image, depth


class Bases:
    """Where below `root` the files of a list lie: the place itself, or one of the folders `bases`.

    Lists of one benchmark name some files from a sub-folder, and its parts lie in several.
    """

    def __init__(self, root: Path, bases: Sequence[str]) -> None:
        self.root = root
        self.bases = ["", *(base for base in bases if (root / base).is_dir())]

    def find(self, name: str) -> str:
        """The file `name` relative to the root; as it is when there is none."""
        for base in self.bases:
            whole = str(PurePosixPath(base, name))
            if (self.root / whole).is_file():
                self.bases.remove(base)
                self.bases.insert(0, base)  # the next one probably lies there too
                return whole
        return name


def listed_pairs(file: Path, bases: Bases) -> list[Record]:
    """The pairs of a list: a picture and its depth on each line, and what else is not needed."""
    records = []
    for number, fields in list_lines(file):
        if len(fields) < 2:
            records.append(Record(f"{file.name}:{number}", problem=f"line {number} of {file.name} names no depth"))
            continue
        rgb, depth = fields[0].lstrip("/"), fields[1].lstrip("/")
        records.append(Record(stem(rgb), bases.find(rgb), depth=bases.find(depth)))
    if not records:
        raise UserError(f"{str(file)!r} lists nothing. Each line names a picture and its depth.")
    return records


def list_lines(file: Path) -> list[tuple[int, list[str]]]:
    """(number from 1, words) of each line that is not blank; raises UserError when the file is no text."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} cannot be read as a list: {error}.") from error
    return [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]


def stem(name: str) -> str:
    """`a/b.png` -> `a/b`."""
    return str(PurePosixPath(name).with_suffix("")) if name else name


def read_npy_array(path: Path, dimensions: Collection[int] = (2,)) -> np.ndarray:
    """A plain array file; raises ValueError for one that holds objects, or has another number of dimensions."""
    try:
        array = np.load(path, allow_pickle=False)
    except EOFError as error:
        raise ValueError(f"{path.name} is empty") from error
    if not isinstance(array, np.ndarray) or array.ndim not in dimensions:
        raise ValueError(f"{path.name} does not hold one array (height, width)")
    return array


def open_hdf5(path: Path) -> Any:
    """An HDF5 file for reading; UserError that names the extra when h5py is not there."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f'{path.name} is an HDF5 file; to read it: pip install h5py, or "crossflow-toolkit[hdf5]".'
        ) from error
    return h5py.File(path, "r")
