"""`pairs:DIR`: images with metric depth, in rgb/ and depth/ (16-bit PNG, millimetres, 0 = no measurement).

An optional frames.json lists the pairs and their splits: {"frames": [{"id", "rgb", "depth", "split"}]}.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from crossflow.core.errors import UserError
from crossflow.data.annotations import json_file
from crossflow.data.files import image_files
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.splits import split_by_hash, split_word

MILLIMETRES = ("mm", "millimetre", "millimetres", "millimeter", "millimeters")


class PairsReader(FileReader):
    """RGB + depth: the pairs and splits of frames.json; without it, files of equal names, split by a hash.

    A hash puts neighbouring frames of one video into different splits, so scores on new scenes need frames.json.
    """

    prefix = "pairs"
    layout = (
        "a folder with rgb/ (images) and depth/ (16-bit PNG of the same names, millimetres), "
        "optionally with frames.json for its splits"
    )
    offers = frozenset(("image", "depth"))

    def listing(self, path: Path, split: str) -> Listing:
        """The pairs of frames.json, or the files of equal names."""
        if (path / "frames.json").is_file():
            return Listing(path, _from_frames(path / "frames.json", split))
        if not ((path / "rgb").is_dir() and (path / "depth").is_dir()):
            raise UserError(f"{self.spec!r} has neither frames.json nor rgb/ and depth/. Expected {self.layout}.")
        records = {record.id: record for record in _from_names(path)}
        members = split_by_hash(self.spec, records, split)
        folders = (path / "rgb", path / "depth")  # either may be a link to where the files are kept
        return Listing(path, [record for name, record in records.items() if name in members], (path, *folders))

    @classmethod
    def recognise(cls, path: Path) -> str:
        """frames.json, or rgb/ and depth/."""
        if (path / "frames.json").is_file():
            return "frames.json"
        return "rgb/ and depth/" if (path / "rgb").is_dir() and (path / "depth").is_dir() else ""


def _from_frames(file: Path, split: str) -> list[Record]:
    content = json_file(file)
    if not (isinstance(content, Mapping) and isinstance(content.get("frames"), list)):
        raise UserError(f"{str(file)!r} must have a list 'frames' of objects with id, rgb, depth and split.")
    unit = content.get("depth_unit", "millimetre")
    if unit not in MILLIMETRES or content.get("invalid", 0) != 0:
        raise UserError(
            f"{str(file)!r} has depth_unit {unit!r} and invalid {content.get('invalid', 0)!r}; depth must be in "
            "millimetres, with 0 for no measurement."
        )
    records = []
    for number, frame in enumerate(content["frames"]):
        values = [frame.get(key) for key in ("rgb", "depth", "split")] if isinstance(frame, Mapping) else []
        names = [value for value in values if isinstance(value, str) and value]
        if len(names) < 3:
            # Its split is unknown, so it is listed in every split.
            label = f"{file.name}:frames[{number}]"
            records.append(Record(label, problem=f"{label} lacks rgb, depth or split"))
            continue
        rgb, depth, where = names
        if split in ("all", split_word(where)):
            id = frame.get("id")
            records.append(Record(str(PurePosixPath(rgb).with_suffix("") if id is None else id), rgb, depth=depth))
    return records


def _from_names(path: Path) -> list[Record]:
    rgb, depth = (
        {str(PurePosixPath(name).with_suffix("")): f"{folder}/{name}" for name in image_files(path / folder)}
        for folder in ("rgb", "depth")
    )
    records = []
    for stem in sorted(rgb.keys() | depth.keys()):
        missing = [f"{folder}/{stem}.*" for folder, files in (("rgb", rgb), ("depth", depth)) if stem not in files]
        problem = f"{missing[0]} is missing" if missing else ""
        records.append(Record(stem, rgb.get(stem, ""), depth=depth.get(stem, ""), problem=problem))
    return records
