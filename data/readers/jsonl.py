"""`jsonl:FILE`: one JSON object per line with an image path and captions.

The layout of JourneyDB's annotations, {"img_path": "./000/a.jpg", "prompt": "a red cube"}, and its usual relatives.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions, json_lines
from crossflow.data.files import fullest_folder
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.splits import split_by_hash, split_word

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("img_path", "image", "image_path", "file_name", "filename", "path")
CAPTION_KEYS = ("prompt", "caption", "captions", "text")


class JsonlReader(FileReader):
    """Images with captions. Splits come from the key `split` if any line has it, else from a hash of the names.

    An image may have several lines. Paths are relative to the file's folder, or to imgs/ or images/ in it.
    """

    prefix = "jsonl"
    layout = (
        "a file with one JSON object per line: an image path below the file's folder "
        f"({', '.join(IMAGE_KEYS)}) and captions ({', '.join(CAPTION_KEYS)})"
    )
    offers = frozenset(("image", "captions"))

    def listing(self, path: Path, split: str) -> Listing:
        """The images of the file, each with the captions of all its lines."""
        if not path.is_file():
            raise UserError(f"{self.spec!r}: {str(path)!r} is a folder. Expected {self.layout}.")
        images, malformed = read_images(path)
        with_captions = any(image.has_captions for image in images.values())
        has_splits = any(image.split for image in images.values())
        if has_splits:
            members = {name for name, image in images.items() if split in ("all", split_word(image.split))}
            # Images without a split are bad items of every split, so that none hides them.
            members |= {name for name, image in images.items() if not image.split}
            others = Counter(image.split for image in images.values() if image.split and not split_word(image.split))
            if others and split != "all":
                logger.warning(
                    "%s: items in the splits %s belong to none of train, val and test.", self.spec, dict(others)
                )
        else:
            members = split_by_hash(self.spec, images, split)
        records = []
        for name, image in images.items():
            if name in members:
                problem = image.problem
                if has_splits and not image.split:
                    problem = problem or "has no split, but other lines have one"
                if with_captions and not image.captions:
                    problem = problem or "all its captions are empty"
                records.append(Record(name, image.path, tuple(image.captions), problem=problem))
        # A malformed line belongs to no split, so it is listed in every split.
        records += malformed
        places = [path.parent, path.parent / "imgs", path.parent / "images"]
        return Listing(fullest_folder(places, [image.path for image in images.values()]), records)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The name of a .jsonl or .ndjson file."""
        return path.name if path.is_file() and path.suffix.lower() in (".jsonl", ".ndjson") else ""


@dataclass
class ImageLines:
    """The content of all lines of one image."""

    path: str
    captions: list[str] = field(default_factory=list)
    has_captions: bool = False
    split: str = ""
    problem: str = ""


def read_images(path: Path) -> tuple[dict[str, ImageLines], list[Record]]:
    """(image name -> content of its lines, in the order of the file; records of the malformed lines)."""
    images: dict[str, ImageLines] = {}
    malformed = []
    for number, entry in json_lines(path):
        if isinstance(entry, str):
            malformed.append(Record(f"{path.name}:{number}", problem=entry))
            continue
        value = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
        if not isinstance(value, str) or not value.strip():
            problem = f"line {number} of {path.name} has no image path under {', '.join(IMAGE_KEYS)}"
            malformed.append(Record(f"{path.name}:{number}", problem=problem))
            continue
        name = str(PurePosixPath(value))
        image = images.setdefault(name, ImageLines(name))
        image.has_captions |= any(key in entry for key in CAPTION_KEYS)
        split = str(entry.get("split") or "")
        if image.split and split and split != image.split:
            image.problem = f"is in the splits {image.split!r} and {split!r} (line {number} of {path.name})"
        image.split = image.split or split
        try:
            image.captions += captions_of(entry)
        except ValueError as error:
            image.problem = f"line {number} of {path.name}: {error}"
    return images, malformed


def captions_of(entry: Mapping) -> tuple[str, ...]:
    """The captions under CAPTION_KEYS, each a string or a list of strings; raises ValueError for other things."""
    return tuple(caption for key in CAPTION_KEYS for caption in clean_captions(entry.get(key)))
