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
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.spec import Option, Options
from crossflow.data.splits import SPLIT_WORDS, split_word

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
    options: ClassVar[Options] = {
        "year": Option("2014 or 2017, of files that are named by year", "newest", ("newest", "2014", "2017"))
    }

    def listing(self, path: Path, split: str) -> Listing:
        year = self.option["year"]
        files = caption_files(path, None if year == "newest" else year)
        if not files:
            raise UserError(f"{self.spec!r} has no captions_SPLIT.json. Expected {self.layout}.")
        if split != "all" and split not in files:
            raise UserError(
                f"{self.spec!r} has captions for {', '.join(files)} but none for {split!r} "
                f"(COCO publishes none for its test images). Write '{self.spec}@val' to use val instead."
            )
        parts = [_read(path, file) for name, file in files.items() if split in (name, "all")]
        if len(parts) == 1:
            return parts[0]
        # Several image folders: name the files from the folder above them, and let them lie in any of those.
        records = [
            replace(record, image=str(PurePosixPath(part.root.relative_to(path).as_posix(), record.image)))
            for part in parts
            for record in part.records
        ]
        return Listing(path, records, tuple(part.root for part in parts))

    @classmethod
    def recognise(cls, path: Path) -> str:
        files = caption_files(path) if path.is_dir() else {}
        return ", ".join(str(file.relative_to(path)) for file in files.values())


def caption_files(folder: Path, wanted: str | None = None) -> dict[str, Path]:
    """split -> captions file, of the year that is wanted, or of no year.

    Where several years lie side by side, the newest that has training captions counts for all splits, because COCO's
    2017 splits were drawn anew from the images of 2014.
    """
    found: dict[str, dict[str, Path]] = {}  # year ("" = none) -> split -> file
    for place in (folder / "annotations", folder):
        for file in sorted(place.glob("captions_*.json")):
            match = NAME.fullmatch(file.name)
            if match:
                word = split_word(match[1]) or match[1]
                found.setdefault(match[2] or "", {}).setdefault(word, file)
    if wanted is not None:
        found = {year: files for year, files in found.items() if year in (wanted, "")}
    if not found:
        return {}
    year = max(found, key=lambda year: ("train" in found[year], year))
    if len(found) > 1:
        others = ", ".join(sorted(other or "no year" for other in found if other != year))
        logger.warning(
            "%s: reading the captions of %s, not those of %s (?year=... chooses).", folder, year or "no year", others
        )
    order = [*SPLIT_WORDS, *sorted(set(found[year]) - set(SPLIT_WORDS))]
    return {word: found[year][word] for word in order if word in found[year]}


def _read(folder: Path, file: Path) -> Listing:
    content = json_file(file)
    if not (
        isinstance(content, Mapping)
        and isinstance(content.get("images"), list)
        and isinstance(content.get("annotations"), list)
    ):
        raise UserError(
            f"{str(file)!r} is not in COCO's caption format: it needs the lists 'images' and 'annotations'."
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
    given = len(texts.get(id, []))
    problem = "" if captions else f"all its {given} captions are empty" if given else "has no caption"
    return Record(id, entry["file_name"], captions, problem=problem)
