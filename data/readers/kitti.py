"""`kitti:DIR`: KITTI with the split lists of Eigen et al. (2014), and annotated depth (Uhrig et al., 2017).

Depth is sparse: 16-bit PNG, metres * 256, 0 where the laser measured nothing. `val` and `test` are scored inside the
crop of Garg et al. (2016) and below 80 m. The Eigen split has no validation list, so 2 % of the training frames are
`val` (see `splits.select_split`).
"""

import logging
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.files import with_links
from crossflow.data.item import Record
from crossflow.data.reader import Listing
from crossflow.data.readers.depth import (
    LIST,
    Bases,
    DepthReader,
    cap_option,
    crop_option,
    list_lines,
    stem,
)
from crossflow.data.spec import Option, Options
from crossflow.data.splits import SPLIT_WORDS

logger = logging.getLogger(__name__)

UNITS_PER_METRE = 256.0
SIDES = {"l": "02", "r": "03"}  # of the colour cameras
BENCHMARK = (352, 1216)  # height and width to which the depth benchmark crops pictures
NUM_TEST, NUM_MEASURED = 697, 652  # frames of Eigen's test list, and those of them with annotated depth


class KittiReader(DepthReader):
    """Street scenes. Frames without annotated depth are left out."""

    prefix = "kitti"
    layout = (
        "a folder with the Eigen lists (eigen_train_files_with_gt.txt, eigen_test_files_with_gt.txt, or "
        "train_files.txt and test_files.txt) beside the raw drives (DATE/DRIVE/image_02/data/N.png) and the annotated "
        "depth (data_depth_annotated/train|val/DRIVE/proj_depth/groundtruth/image_02/N.png)"
    )
    options: ClassVar[Options] = {
        "crop": crop_option("garg", "eigen"),
        "cap": cap_option("80"),
        "benchmark": Option(
            "crop all pictures to the depth benchmark's 352 x 1216, bottom centre", "no", ("yes", "no")
        ),
        "list": LIST,
    }
    bases = (
        *("raw", "raw_data", "kitti_raw", "input", "images"),
        *("data_depth_annotated/train", "data_depth_annotated/val", "data_depth_annotated", "depth"),
        *("gts", "train", "val"),
    )

    def listing(self, path: Path, split: str) -> Listing:
        """The frames of the option `list`, or those of the Eigen lists."""
        bases = Bases(path, self.bases)
        file = self.path_option("list", path)
        if file is not None:
            return Listing(path, self._frames(file, bases), with_links(path))
        return self.list_pairs(path, split)

    def list_pairs(self, path: Path, split: str) -> Listing:
        """The frames of the Eigen lists."""
        lists = list_files(path)
        if not lists:
            raise UserError(f"{self.spec!r} has no lists of the Eigen split. Expected {self.layout}.")
        bases = Bases(path, self.bases)
        records = self.published_records(split, lists, lambda file: self._frames(file, bases))
        if split == "test":
            self._require_complete(lists["test"], records)
        return Listing(path, records, with_links(path))

    def _require_complete(self, file: Path, records: list[Record]) -> None:
        """Raises UserError when annotated depth of the published test list is missing."""
        if len(list_lines(file)) == NUM_TEST and len(records) != NUM_MEASURED:
            raise UserError(
                f"{self.spec!r}: of the {NUM_TEST} frames of the Eigen test list, {NUM_MEASURED} have annotated depth, "
                f"but the depth of {len(records)} exists. A score on these would not be comparable; check that "
                "the depth is complete (drives of data_depth_annotated/train and val)."
            )

    def _frames(self, file: Path, bases: Bases) -> list[Record]:
        records, unmeasured, lines = [], 0, list_lines(file)
        for number, fields in lines:
            try:
                rgb, depth = _frame(fields)
            except ValueError as error:
                records.append(Record(f"{file.name}:{number}", problem=f"line {number} of {file.name} {error}"))
                continue
            by_number = fields[1].isdigit()  # such a list does not say which frames have depth; the files do
            depth = bases.find(depth) if depth else ""
            if not depth or (by_number and not (bases.root / depth).is_file()):
                unmeasured += 1
                continue
            image = bases.find(rgb)
            if not (bases.root / image).is_file():
                image = bases.find(str(PurePosixPath(rgb).with_suffix(".jpg")))
            records.append(Record(stem(rgb), image, depth=depth))
        if unmeasured:
            logger.info("%s: %d of %d frames have no annotated depth and are left out.", file, unmeasured, len(lines))
        if not records:
            raise UserError(f"{self.spec!r}: none of the {len(lines)} frames of {file.name} has annotated depth.")
        return records

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The image and its depth in metres, cropped by the option `benchmark`."""
        from crossflow.data.images import load_depth_png, load_image

        image = load_image(self.path(record.image))
        depth = load_depth_png(self.path(record.depth), units_per_metre=UNITS_PER_METRE)
        if self.option["benchmark"] == "no" or depth.shape != image.shape[:2]:
            return image, depth
        height, width = BENCHMARK
        if depth.shape[0] < height or depth.shape[1] < width:
            raise ValueError(
                f"a picture of {depth.shape[0]}x{depth.shape[1]} is too small for the crop of {height}x{width}"
            )
        top, left = depth.shape[0] - height, (depth.shape[1] - width) // 2
        part = (slice(top, top + height), slice(left, left + width))
        return np.ascontiguousarray(image[part]), np.ascontiguousarray(depth[part])

    @classmethod
    def recognise(cls, path: Path) -> str:
        """An Eigen list."""
        return next((file.name for file in list_files(path).values() if "eigen" in file.name), "")


def list_files(path: Path) -> dict[str, Path]:
    """split -> its list, of those that exist."""
    if not path.is_dir():
        return {}
    patterns = ("eigen_{}_files_with_gt.txt", "eigen_{}_files.txt", "{}_files_with_gt.txt", "{}_files.txt")
    folders = [path / name for name in ("", "splits", "splits/eigen", "eigen")]
    lists = {}
    for split in SPLIT_WORDS:
        files = (folder / pattern.format(split) for pattern in patterns for folder in folders)
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            lists[split] = file
    return lists


def _frame(fields: list[str]) -> tuple[str, str]:
    """(picture, depth or "") of a line: `PICTURE DEPTH FOCAL` with DEPTH `None` if there is none, or `DRIVE N l|r`."""
    if len(fields) < 2:
        raise ValueError("names no depth; expected PICTURE DEPTH FOCAL, or DRIVE NUMBER l")
    if fields[1].isdigit():
        drive, side = PurePosixPath(fields[0].strip("/")), fields[2] if len(fields) > 2 else "l"
        if side not in SIDES:
            raise ValueError(f"names the side {side!r}, which is l or r")
        camera, frame = f"image_{SIDES[side]}", f"{int(fields[1]):010d}.png"
        return f"{drive}/{camera}/data/{frame}", f"{drive.name}/proj_depth/groundtruth/{camera}/{frame}"
    depth = fields[1].lstrip("/")
    return fields[0].lstrip("/"), "" if depth == "None" else depth
