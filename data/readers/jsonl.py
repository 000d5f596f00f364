"""`jsonl:FILE`: one JSON object per line with an image path and captions.

The layout of JourneyDB's annotations, {"img_path": "./000/a.jpg", "prompt": "a red cube"}, and its usual relatives.
"""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions
from crossflow.data.files import fullest_folder
from crossflow.data.index.items import Index
from crossflow.data.index.lines import Line
from crossflow.data.reader import FileReader, Listing
from crossflow.data.splits import SPLIT_WORDS, expect_hashed

logger = logging.getLogger(__name__)

VERSION = "jsonl 1"  # of `parse_line`; changes with what it returns
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
        index = Index(path, functools.partial(parse_line, path.name), self.spec, VERSION)
        if index.other_splits and split != "all":
            logger.warning(
                "%s: items in the splits %s belong to none of train, val and test.", self.spec, index.other_splits
            )
        if not index.with_splits:
            expect_hashed(self.spec, {word: index.num_images[word] for word in SPLIT_WORDS}, split)
        places = [path.parent, path.parent / "imgs", path.parent / "images"]
        return Listing(fullest_folder(places, index.names()), index.split(split))

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The name of a .jsonl or .ndjson file."""
        return path.name if path.is_file() and path.suffix.lower() in (".jsonl", ".ndjson") else ""


def parse_line(file: str, number: int, entry: dict | str) -> Line:
    """What line `number` of `file` says about an image."""
    label = f"{file}:{number}"
    if isinstance(entry, str):
        return Line(label, problem=entry, malformed=True)
    value = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
    if not isinstance(value, str) or not value.strip():
        problem = f"line {number} of {file} has no image path under {', '.join(IMAGE_KEYS)}"
        return Line(label, problem=problem, malformed=True)
    captions: tuple[str, ...] = ()
    problem = ""
    try:
        captions = captions_of(entry)
    except ValueError as error:
        problem = f"line {number} of {file}: {error}"
    has_captions = any(key in entry for key in CAPTION_KEYS)
    return Line(str(PurePosixPath(value)), captions, str(entry.get("split") or ""), problem, has_captions)


def captions_of(entry: Mapping) -> tuple[str, ...]:
    """The captions under CAPTION_KEYS, each a string or a list of strings; raises ValueError for other things."""
    return tuple(caption for key in CAPTION_KEYS if key in entry for caption in clean_captions(entry[key]))
