"""Base of the readers of depth benchmarks: the crop and the cap of their tables, and lists of pairs.

Where a benchmark scores part of a picture, the depth outside that part is 0 (no measurement) in the items of `val` and
`test`, at the resolution of the files, so it stays excluded when a task crops or resizes the picture afterwards.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.files import with_links
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.spec import Option, Options
from crossflow.data.splits import published_split, require_split, select_split

T = TypeVar("T")

CROPS = {  # top, bottom, left, right, as shares of height and width
    "none": (0.0, 1.0, 0.0, 1.0),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),  # KITTI, Eigen et al. 2014
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),  # KITTI, Garg et al. 2016
    "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),  # Eigen's crop of NYU Depth V2, inside its white border
}


def mask_unscored(depth: np.ndarray, crop: str = "none", cap: float | None = None) -> np.ndarray:
    """float32 (H, W) metres with 0 outside the named crop, and where depth is `cap` metres or more."""
    height, width = depth.shape
    top, bottom, left, right = CROPS[crop]
    inside = np.zeros(depth.shape, dtype=bool)
    inside[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
    if cap is not None:
        inside &= depth < cap
    return np.where(inside, depth, 0).astype(np.float32)


def crop_option(default: str, *others: str) -> Option:
    """The option `crop`: one of the names in CROPS."""
    return Option(
        "part of the picture that val and test score", default, tuple(dict.fromkeys((default, *others, "none")))
    )


def cap_option(default: str) -> Option:
    """The option `cap`, in metres."""
    return Option("depth in metres from which val and test score nothing", default, number=True)


LIST = Option("text file with a picture and its depth on each line, which replaces the splits", is_place=True)


class DepthReader(FileReader):
    """Pictures with depth. A subclass defines `list_pairs`, and `read_pair` unless depth is PNG in millimetres."""

    offers = frozenset(("image", "depth"))
    options: ClassVar[Options] = {"list": LIST, "cap": cap_option("none")}
    bases: ClassVar[tuple[str, ...]] = ()  # folders that file names in lists may be relative to, besides the location

    def listing(self, path: Path, split: str) -> Listing:
        """The pairs of the option `list`, or those of `list_pairs`."""
        file = self.path_option("list", path if path.is_dir() else path.parent)
        if file is None:
            return self.list_pairs(path, split)
        return Listing(path, read_pairs(file, Bases(path, self.bases)), with_links(path))

    @abstractmethod
    def list_pairs(self, path: Path, split: str) -> Listing:
        """As `listing`, without the option `list`."""

    def published_records(
        self, split: str, published: Mapping[str, T], records: Callable[[T], list[Record]]
    ) -> list[Record]:
        """The records of `split` of data that publish some splits, such as train and test, in `published`.

        records: the records of one of its values. Without a validation split, part of train is `val`.
        """
        name = published_split(split, published)
        require_split(self.spec, name, published)
        chosen = [record for word, value in published.items() if name in (word, "all") for record in records(value)]
        return [chosen[index] for index in select_split([record.id for record in chosen], split, published)]

    def read(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The image uint8 (H, W, 3) and the depth float32 (H, W) in metres, 0 = no measurement or not scored."""
        image, depth = self.read_pair(record)
        depth = np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
        if self.split in ("val", "test"):
            depth = mask_unscored(depth, self.option.get("crop", "none"), self.number_option("cap"))
        return image, depth

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The image and its depth in metres; values that are not finite or not above 0 are no measurement."""
        image, depth = super().read(record)
        assert depth is not None
        return image, depth


class Bases:
    """The folders below `root` that the names of a list may be relative to: `root` itself and `bases`.

    The lists of a benchmark name some files relative to a sub-folder, and its parts are unpacked in several.
    """

    def __init__(self, root: Path, bases: Sequence[str]) -> None:
        self.root = root
        self.bases = ["", *(base for base in bases if (root / base).is_dir())]

    def find(self, name: str) -> str:
        """The file `name` relative to the root; `name` itself when it does not exist."""
        for base in self.bases:
            whole = str(PurePosixPath(base, name))
            if (self.root / whole).is_file():
                self.bases.remove(base)
                self.bases.insert(0, base)  # the next file is probably there too
                return whole
        return name


def read_pairs(file: Path, bases: Bases) -> list[Record]:
    """The pairs of a list: the first two words of each line are a picture and its depth, the rest is ignored."""
    records = []
    for number, fields in list_lines(file):
        if len(fields) < 2:
            records.append(Record(f"{file.name}:{number}", problem=f"line {number} of {file.name} names no depth"))
            continue
        rgb, depth = fields[0].lstrip("/"), fields[1].lstrip("/")
        records.append(Record(stem(rgb), bases.find(rgb), depth=bases.find(depth)))
    if not records:
        raise UserError(f"{str(file)!r} lists no pairs. Each line must name a picture and its depth.")
    return records


def list_lines(file: Path) -> list[tuple[int, list[str]]]:
    """(number from 1, words) of each line that is not blank; raises UserError when the file is not text."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} cannot be read as a list: {error}.") from error
    return [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]


def stem(name: str) -> str:
    """`a/b.png` -> `a/b`."""
    return str(PurePosixPath(name).with_suffix("")) if name else name


def read_npy_array(path: Path, dimensions: Collection[int] = (2,)) -> np.ndarray:
    """The array of a .npy file. Raises ValueError for objects, or for a number of dimensions not in `dimensions`."""
    try:
        array = np.load(path, allow_pickle=False)
    except EOFError as error:
        raise ValueError(f"{path.name} is empty") from error
    if not isinstance(array, np.ndarray) or array.ndim not in dimensions:
        raise ValueError(f"{path.name} does not hold one array (height, width)")
    return array


def open_hdf5(path: Path) -> Any:
    """An HDF5 file opened for reading. Raises UserError, which names the extra, when h5py is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f'{path.name} is an HDF5 file; to read it: pip install h5py, or "crossflow-toolkit[hdf5]".'
        ) from error
    return h5py.File(path, "r")
