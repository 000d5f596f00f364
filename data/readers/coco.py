"""`coco:DIR`: captions in COCO's format.

As published (annotations/captions_train2017.json + train2017/) or plain (captions_train.json + images/).
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions, json_file
from crossflow.data.files import fullest_folder
from crossflow.data.index.items import LARGEST_IN_MEMORY
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.spec import Option, Options
from crossflow.data.splits import SPLIT_WORDS, require_split, split_word

logger = logging.getLogger(__name__)

NAME = re.compile(r"captions_([A-Za-z]+)(\d{4})?\.json")


class CocoReader(FileReader):
    """Images with captions, by split. An image whose captions are all empty is a bad item."""

    prefix = "coco"
    layout = (
        "a folder with annotations/captions_train2017.json and train2017/, or captions_train.json and images/ "
        "(likewise for val and test)"
    )
    offers = frozenset(("image", "captions"))
    options: ClassVar[Options] = {"year": Option("year in the file names", "newest", ("newest", "2014", "2017"))}

    def listing(self, path: Path, split: str) -> Listing:
        """The images of `captions_SPLIT.json` with their captions."""
        files = self._files(path)
        if not files:
            raise UserError(f"{self.spec!r} has no captions_SPLIT.json. Expected {self.layout}.")
        require_split(
            self.spec, split, files, "COCO publishes no captions for its test images" if split == "test" else ""
        )
        parts = [_read(path, file) for name, file in files.items() if split in (name, "all")]
        if len(parts) == 1:
            return parts[0]
        # Several image folders: file names become relative to `path`, and files may lie in any of the folders.
        records = [
            replace(record, image=str(PurePosixPath(part.root.relative_to(path).as_posix(), record.image)))
            for part in parts
            for record in part.records
        ]
        return Listing(path, records, tuple(part.root for part in parts))

    def is_large(self, path: Path) -> bool:
        """Whether a captions file is large."""
        return any(file.stat().st_size > LARGEST_IN_MEMORY for file in self._files(path).values())

    def watched(self, path: Path) -> list[Path]:
        """The captions files, and the folders whose names decide where the images are."""
        return [path, path / "annotations", path / "images", *self._files(path).values()]

    def _files(self, path: Path) -> dict[str, Path]:
        """The captions files by split."""
        year = self.option["year"]
        return caption_files(path, None if year == "newest" else year)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The captions files."""
        files = caption_files(path) if path.is_dir() else {}
        return ", ".join(str(file.relative_to(path)) for file in files.values())


def caption_files(folder: Path, only_year: str | None = None) -> dict[str, Path]:
    """split -> captions file, of the year `only_year` or without a year in its name.

    Among several years, the newest one with training captions is used for all splits, because COCO's 2017 splits
    divide the images of 2014 differently.
    """
    by_year: dict[str, dict[str, Path]] = {}  # year ("" = none) -> split -> file
    for place in (folder / "annotations", folder):
        for file in sorted(place.glob("captions_*.json")):
            match = NAME.fullmatch(file.name)
            if match:
                word = split_word(match[1]) or match[1]
                by_year.setdefault(match[2] or "", {}).setdefault(word, file)
    if only_year is not None:
        by_year = {year: files for year, files in by_year.items() if year in (only_year, "")}
    if not by_year:
        return {}
    year = max(by_year, key=lambda year: ("train" in by_year[year], year))
    if len(by_year) > 1:
        others = ", ".join(sorted(other or "no year" for other in by_year if other != year))
        logger.warning(
            "%s: reading the captions of %s, not those of %s (choose by ?year=...).", folder, year or "no year", others
        )
    order = [*SPLIT_WORDS, *sorted(set(by_year[year]) - set(SPLIT_WORDS))]
    return {word: by_year[year][word] for word in order if word in by_year[year]}


def _read(folder: Path, file: Path) -> Listing:
    content = json_file(file)
    if not (
        isinstance(content, Mapping)
        and isinstance(content.get("images"), list)
        and isinstance(content.get("annotations"), list)
    ):
        raise UserError(
            f"{str(file)!r} is not in COCO's caption format: it must have the lists 'images' and 'annotations'."
        )
    texts: dict[object, list[object]] = {}
    for annotation in content["annotations"]:
        if isinstance(annotation, Mapping):
            texts.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
    records = [_record(number, entry, texts, file) for number, entry in enumerate(content["images"])]
    word = file.stem.removeprefix("captions_")  # train2017, or train
    places = [folder / word, folder / "images" / word, folder / "images", folder]
    return Listing(fullest_folder(places, [record.image for record in records]), records)


def _record(number: int, entry: object, texts: Mapping[object, list[object]], file: Path) -> Record:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("file_name"), str) or "id" not in entry:
        return Record(f"{file.name}:images[{number}]", problem=f"entry {number} of 'images' has no id and file_name")
    id = str(entry["id"])
    try:
        captions = clean_captions(texts.get(id, []))
    except ValueError as error:
        return Record(id, entry["file_name"], problem=str(error))
    count = len(texts.get(id, []))
    problem = "" if captions else f"all its {count} captions are empty" if count else "has no caption"
    return Record(id, entry["file_name"], captions, problem=problem)
