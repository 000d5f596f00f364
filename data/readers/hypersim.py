"""`hypersim:DIR`: rendered rooms (Roberts et al., 2021), their distances converted to depth.

A file stores the distance r of each pixel's surface from the camera's centre. The depth along the optical axis is
z = r f / sqrt(x^2 + y^2 + f^2), where (x, y) is the pixel's offset from the picture's centre and f the focal length.
"""

import csv
import logging
import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.files import with_links
from crossflow.data.item import Record
from crossflow.data.reader import Listing
from crossflow.data.readers.depth import LIST, DepthReader, cap_option, open_hdf5
from crossflow.data.spec import Options
from crossflow.data.splits import require_split, split_by_hash, split_word

logger = logging.getLogger(__name__)

SPLITS_FILE = "metadata_images_split_scene_v1.csv"
FOCAL_LENGTH = 886.81 / 1024  # of the cameras without tilt or shift, in picture widths
SCENE = re.compile(r"ai_\d{3}_\d{3}")
PICTURE = re.compile(r"scene_(cam_\d+)_final_preview")


class HypersimReader(DepthReader):
    """RGB (tonemap.jpg) + depth.

    Splits are those of the authors' table, without the frames that it excludes; without the table, a hash divides the
    scenes. All cameras are treated as pinholes, including the few with tilt or shift.
    """

    prefix = "hypersim"
    layout = (
        f"a folder with {SPLITS_FILE} and ai_VVV_NNN/images/scene_cam_XX_final_preview/frame.IIII.tonemap.jpg and "
        "scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5"
    )
    options: ClassVar[Options] = {"cap": cap_option("none"), "list": LIST}

    def list_pairs(self, path: Path, split: str) -> Listing:
        """The frames of the authors' table, or of all scene folders."""
        table = path / SPLITS_FILE
        rows = _table(table) if table.is_file() else None
        records = self._of_table(path, rows, split) if rows is not None else self._of_folders(path, split)
        return Listing(path, records, with_links(path))

    def _of_table(self, path: Path, rows: list[dict[str, str]], split: str) -> list[Record]:
        present = {scene.name for scene in _scenes(path)}
        absent = {row["scene_name"] for row in rows} - present
        if absent:
            logger.warning("%s: %d of the scenes in %s are missing.", self.spec, len(absent), SPLITS_FILE)
        rows = [
            row
            for row in rows
            if row["scene_name"] in present and row.get("included_in_public_release", "True").lower() == "true"
        ]
        require_split(self.spec, split, sorted({split_word(row["split_partition_name"]) for row in rows} - {""}))
        return [
            _record(row["scene_name"], row["camera_name"], int(row["frame_id"]))
            for row in rows
            if split in ("all", split_word(row["split_partition_name"]))
        ]

    def _of_folders(self, path: Path, split: str) -> list[Record]:
        scenes = {scene.name: scene for scene in _scenes(path)}
        if not scenes:
            raise UserError(f"{self.spec!r} has no scenes (ai_001_001, ...). Expected {self.layout}.")
        logger.warning("%s has no %s, so its splits are not the official ones.", self.spec, SPLITS_FILE)
        members = split_by_hash(self.spec, scenes, split)
        records = []
        for name in sorted(members):
            for folder in sorted((scenes[name] / "images").glob("scene_cam_*_final_preview")):
                match = PICTURE.fullmatch(folder.name)
                for file in sorted(folder.glob("frame.*.tonemap.jpg")) if match else ():
                    assert match is not None
                    number = file.name.split(".")[1]
                    if number.isdigit():
                        records.append(_record(name, match[1], int(number)))
        return records

    def read_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The tonemapped image, and depth along the optical axis in metres."""
        from crossflow.data.images import load_image

        image = load_image(self.path(record.image))
        with open_hdf5(self.path(record.depth)) as content:
            if "dataset" not in content or getattr(content["dataset"], "ndim", None) != 2:
                raise ValueError(f"{record.depth} has no array 'dataset' (height, width)")
            distance = content["dataset"][()].astype(np.float64)
        return image, planar_depth(distance)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The first scene folder."""
        scenes = _scenes(path) if path.is_dir() else []
        return scenes[0].name if scenes else ""


def planar_depth(distance: np.ndarray, focal_length: float | None = None) -> np.ndarray:
    """Distances (H, W) from the camera's centre -> depths along its axis, float32, in the same unit.

    focal_length: in pixels; None means that of Hypersim's cameras at this width.
    """
    height, width = distance.shape
    f = FOCAL_LENGTH * width if focal_length is None else focal_length
    x = np.arange(width) - (width - 1) / 2
    y = np.arange(height)[:, None] - (height - 1) / 2
    return (distance * (f / np.sqrt(x**2 + y**2 + f**2))).astype(np.float32)


def _scenes(path: Path) -> list[Path]:
    """The scene folders (ai_001_001, ...)."""
    return [child for child in sorted(path.iterdir()) if SCENE.fullmatch(child.name) and child.is_dir()]


def _record(scene: str, camera: str, frame: int) -> Record:
    where, name = f"{scene}/images/scene_{camera}", f"frame.{frame:04d}"
    return Record(
        f"{scene}/{camera}/{name}",
        f"{where}_final_preview/{name}.tonemap.jpg",
        depth=f"{where}_geometry_hdf5/{name}.depth_meters.hdf5",
    )


def _table(file: Path) -> list[dict[str, str]]:
    needed = ("scene_name", "camera_name", "frame_id", "split_partition_name")
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{str(file)!r} cannot be read as a table: {error}.") from error
    missing = [name for name in needed if rows and name not in rows[0]]
    if not rows or missing or not all((row["frame_id"] or "").isdigit() for row in rows):
        raise UserError(f"{str(file)!r} must be a table with the columns {', '.join(needed)}.")
    return rows
