"""`nyu:DIR`: NYU Depth V2 (Silberman et al., 2012): the labelled .mat file, or folders of the official split.

The file is HDF5: images (1449, 3, 640, 480) and depths in metres (1449, 640, 480), transposed as MATLAB writes them.
`val` and `test` are scored inside Eigen's crop and below 10 m. The published data have no validation split, so 2 % of
the training pictures are `val` (see `splits.select_split`).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from crossflow.core.errors import PARSING_ERRORS, UserError
from crossflow.data.files import image_files, with_links
from crossflow.data.item import Record
from crossflow.data.reader import Listing
from crossflow.data.readers.depth import (
    LIST,
    Bases,
    DepthReader,
    cap_option,
    crop_option,
    open_hdf5,
    read_pairs,
    stem,
)
from crossflow.data.spec import Option, Options
from crossflow.data.splits import split_folders

LABELLED = "nyu_depth_v2_labeled.mat"
LISTS = {split: f"nyudepthv2_{split}_files_with_gt.txt" for split in ("train", "test")}
RGB = re.compile(r"rgb_(\d+)\.(jpg|jpeg|png)", re.IGNORECASE)
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class NyuReader(DepthReader):
    """RGB + Kinect depth: `raw`, with holes, as the tables use it, or `filled` in by the authors' colourisation."""

    prefix = "nyu"
    layout = (
        f"{LABELLED} with splits.mat beside it, or a folder with train/ and test/ of rgb_N.jpg and sync_depth_N.png, "
        f"or one with {LISTS['train']} and {LISTS['test']}"
    )
    options: ClassVar[Options] = {
        "crop": crop_option("nyu"),
        "cap": cap_option("10"),
        "depth": Option("raw depth with holes, or depth filled in", "raw", ("raw", "filled")),
        "splits": Option("path of splits.mat, unless it lies beside the data", is_place=True),
        "list": LIST,
    }
    bases = ("sync", "official_splits/test", "official_splits/train", "nyu_depth_v2/sync", "test", "train")

    def list_pairs(self, path: Path, split: str) -> Listing:
        """The pairs of the labelled file, of the lists, or of the folders."""
        file = path if path.is_file() else path / LABELLED
        if file.is_file():
            return self._labelled(file, split)
        lists = {name: path / list for name, list in LISTS.items() if (path / list).is_file()}
        if lists:
            bases = Bases(path, self.bases)
            records = self.published_records(split, lists, lambda file: read_pairs(file, bases))
            return Listing(path, records, with_links(path))
        folder = path / "official_splits" if (path / "official_splits").is_dir() else path
        folders = split_folders(folder)
        if not folders:
            raise UserError(f"{self.spec!r} is not laid out as NYU Depth V2. Expected {self.layout}.")
        records = self.published_records(split, folders, lambda inner: self._folder(path, inner))
        return Listing(path, records, with_links(folder))

    def _folder(self, root: Path, folder: Path) -> list[Record]:
        names = ("filled_",) if self.option["depth"] == "filled" else ("sync_depth_", "depth_")
        records = []
        for name in image_files(folder):
            match = RGB.fullmatch(name.rpartition("/")[2])
            if match is None:
                continue
            beside = (folder / name).parent
            depths = [beside / f"{prefix}{match[1]}.png" for prefix in names]
            depth = next((file for file in depths if file.is_file()), None)
            image = (folder / name).relative_to(root).as_posix()
            problem = "" if depth else f"{depths[0].name} is missing beside it"
            records.append(
                Record(stem(image), image, depth=depth.relative_to(root).as_posix() if depth else "", problem=problem)
            )
        return records

    # -- the labelled file

    def _labelled(self, file: Path, split: str) -> Listing:
        try:
            with file.open("rb") as opened:
                start = opened.read(520)
            if HDF5_SIGNATURE not in (start[:8], start[512:]):  # MATLAB writes 512 bytes before the HDF5 content
                raise UserError(f"{str(file)!r} is not a MATLAB 7.3 file, unlike the published {LABELLED}.")
            with open_hdf5(file) as content:
                total = int(_array(content, "images", 4).shape[0])
        except (ValueError, OSError) as error:
            raise UserError(f"{str(file)!r} cannot be read as {LABELLED}: {error}.") from error

        def numbered(numbers: Iterable[int]) -> list[Record]:
            # Both names are the file itself: the record's id is the number of its picture, counted from 1 as in MATLAB.
            return [Record(f"{number:04d}", file.name, depth=file.name) for number in numbers]

        if split == "all":
            return Listing(file.parent, numbered(range(1, total + 1)))
        published = {name: name for name in LISTS}
        records = self.published_records(split, published, lambda name: numbered(self._members(file, name, total)))
        return Listing(file.parent, records)

    def _members(self, file: Path, split: str, total: int) -> list[int]:
        """The numbers of the pictures of a published split, from 1."""
        splits = self.path_option("splits", file.parent) or file.parent / "splits.mat"
        if not splits.is_file():
            raise UserError(
                f"{self.spec!r} needs the official splits: put splits.mat (trainNdxs and testNdxs, from the data set's "
                f"page) beside {file.name}, give its path by ?splits=FILE, or write '{self.spec}@all'."
            )
        numbers = _indices(splits, f"{split}Ndxs")
        beyond = [number for number in numbers if not 1 <= number <= total]
        if beyond:
            raise UserError(f"{str(splits)!r} lists picture {beyond[0]} for {split}, but {file.name} has 1 to {total}.")
        return numbers

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The image and its depth in metres, from PNG files or the labelled file."""
        if not record.image.endswith(".mat"):
            return super().read_pair(record)
        index, name = int(record.id) - 1, "rawDepths" if self.option["depth"] == "raw" else "depths"
        with open_hdf5(self.path(record.image)) as content:
            image, depth = _array(content, "images", 4)[index], _array(content, name, 3)[index]
        return np.ascontiguousarray(image.transpose(2, 1, 0)), np.ascontiguousarray(depth.T)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The labelled file or a list."""
        names = [LABELLED, *LISTS.values()]
        return next((name for name in names if path.name == name or (path.is_dir() and (path / name).is_file())), "")


def _array(content: Mapping[str, Any], name: str, dimensions: int) -> Any:
    """The HDF5 array `name`. Raises ValueError unless it has `dimensions` dimensions."""
    if name not in content or getattr(content[name], "ndim", None) != dimensions:
        raise ValueError(f"it has no array {name!r} of {dimensions} dimensions")
    return content[name]


def _indices(file: Path, name: str) -> list[int]:
    """The numbers `name` of a MATLAB 5 file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(file, variable_names=[name])
        return [int(number) for number in np.ravel(content[name])]
    except (*PARSING_ERRORS, MatReadError) as error:
        raise UserError(f"{str(file)!r} cannot be read as splits.mat with {name!r}: {error}.") from error
