"""`karpathy:FILE`: the caption splits of Karpathy and Fei-Fei (2015) for COCO, Flickr8k and Flickr30k.

dataset_coco.json: {"images": [{"filepath", "filename", "split", "cocoid", "imgid", "sentids", "sentences": [{"raw",
"sentid", "imgid"}]}], "dataset"}. The split `restval` is trained on. COCO: 113,287 / 5,000 / 5,000 pictures.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import ClassVar

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions, json_file
from crossflow.data.files import fullest_folder, with_links
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.spec import Option, Options
from crossflow.data.splits import require_split, split_word

logger = logging.getLogger(__name__)

PUBLISHED = {  # pictures for training, validation and testing
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000},
    "flickr8k": {"train": 6_000, "val": 1_000, "test": 1_000},
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},
}
NUMBER = re.compile(r"(\d+)\.\w+$")
FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images", "flickr30k_images")


class KarpathyReader(FileReader):
    """Pictures with their captions.

    val and test must be complete: a score on part of their pictures would not be comparable, so a missing picture or a
    wrong id is an error there rather than a bad item.
    """

    prefix = "karpathy"
    layout = (
        "dataset_coco.json (or _flickr8k, _flickr30k) or the folder that holds one, with the pictures beside it "
        "(train2014/, val2014/, images/)"
    )
    offers = frozenset(("image", "captions"))
    options: ClassVar[Options] = {
        "images": Option("folder of the pictures, if elsewhere", is_place=True),
        "incomplete": Option("when pictures of val or test are missing", "refuse", ("refuse", "skip")),
    }

    def listing(self, path: Path, split: str) -> Listing:
        """The pictures of a split with their captions."""
        file = self._file(path)
        entries = read_entries(file)
        counts = Counter(split_of(entry) for entry in entries)
        require_split(self.spec, split, counts)
        records = [_record(number, entry, file) for number, entry in enumerate(entries)]
        records = [record for record, entry in zip(records, entries, strict=True) if split in ("all", split_of(entry))]
        name = file.stem.removeprefix("dataset_")
        expected = PUBLISHED.get(name, {}).get(split, len(records))
        if len(records) != expected:
            logger.warning(
                "%s has %d pictures for %s; the published file has %d: scores are not comparable with the tables.",
                *(file, len(records), split, expected),
            )
        folder = self.path_option("images", file.parent)
        if folder is None:
            above = (file.parent, file.parent.parent)
            places = [file.parent, *(parent / name for parent in above for name in FOLDERS), file.parent.parent]
            folder = fullest_folder(places, [record.image for record in records])
        records = [self._locate(record, folder) for record in records]
        if split in ("val", "test") and self.option["incomplete"] == "refuse":
            self._refuse_incomplete(records, split, folder)
        return Listing(folder, records, with_links(folder))

    def _file(self, path: Path) -> Path:
        if path.is_file():
            return path
        files = sorted(path.glob("dataset_*.json")) or sorted(path.glob("*/dataset_*.json"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise UserError(f"{self.spec!r} must contain one dataset_NAME.json, got: {names}. Name the file itself.")
        return files[0]

    def _locate(self, record: Record, folder: Path) -> Record:
        """The record with the path of its picture: in train2014/ or val2014/, or all pictures in one folder."""
        if record.problem or (folder / record.image).is_file():
            return record
        bare = PurePosixPath(record.image).name
        if (folder / bare).is_file():
            return Record(record.id, bare, record.captions)
        return Record(record.id, record.image, record.captions, problem=f"no such file: {record.image!r} in {folder}")

    def _refuse_incomplete(self, records: list[Record], split: str, folder: Path) -> None:
        bad = [record for record in records if record.problem]
        if bad:
            listed = "; ".join(f"{record.id}: {record.problem}" for record in bad[:3])
            raise UserError(
                f"{self.spec!r}: {len(bad)} of the {len(records)} pictures of {split} do not match the list, such as "
                f"{listed}. A score on the others would not be comparable with the tables. Put them into {folder}, "
                "name the folder of the pictures by ?images=DIR, or skip them by ?incomplete=skip."
            )

    @classmethod
    def recognise(cls, path: Path) -> str:
        """A file dataset_NAME.json."""
        if path.is_file():
            return path.name if re.fullmatch(r"dataset_(coco|flickr8k|flickr30k)\.json", path.name) else ""
        return next((file.name for file in sorted(path.glob("dataset_*.json"))), "") if path.is_dir() else ""


def read_entries(file: Path) -> list[Mapping]:
    """The entries of `images`. Raises UserError for another structure, and for an id that occurs twice."""
    content = json_file(file)
    images = content.get("images") if isinstance(content, Mapping) else None
    if not isinstance(images, list) or not images or not all(isinstance(entry, Mapping) for entry in images):
        raise UserError(f"{str(file)!r} is not a file of Karpathy's splits: it must have the list 'images'.")
    for key in ("cocoid", "imgid", "filename"):
        counts = Counter(str(entry[key]) for entry in images if key in entry)
        twice = [value for value, count in counts.items() if count > 1]
        if twice:
            raise UserError(
                f"{str(file)!r} gives the {key} {twice[0]} to {counts[twice[0]]} pictures; ids must be unique."
            )
    sentences = Counter(str(sentence.get("sentid")) for entry in images for sentence in _sentences(entry))
    twice = [value for value, count in sentences.items() if count > 1 and value != "None"]
    if twice:
        raise UserError(f"{str(file)!r} gives the sentid {twice[0]} to {sentences[twice[0]]} captions.")
    return images


def split_of(entry: Mapping) -> str:
    """train, val, test, or "" for an unknown one; `restval` (the rest of COCO's val2014) is train."""
    word = str(entry.get("split", ""))
    return "train" if word == "restval" else split_word(word)


def _sentences(entry: Mapping) -> list[Mapping]:
    sentences = entry.get("sentences")
    return [sentence for sentence in sentences if isinstance(sentence, Mapping)] if isinstance(sentences, list) else []


def _record(number: int, entry: Mapping, file: Path) -> Record:
    name = entry.get("filename")
    if not isinstance(name, str) or not name:
        return Record(f"{file.name}:images[{number}]", problem=f"entry {number} of 'images' has no filename")
    id = str(entry.get("cocoid", PurePosixPath(name).stem))
    image = str(PurePosixPath(str(entry.get("filepath") or ""), name))
    try:
        captions = clean_captions([sentence.get("raw") for sentence in _sentences(entry)])
        problem = _mismatch(entry) or ("" if captions else "has no caption")
    except ValueError as error:
        captions, problem = (), str(error)
    return Record(id, image, captions, problem=problem)


def _mismatch(entry: Mapping) -> str:
    """The contradiction within an entry; "" if there is none."""
    if not split_of(entry):
        return f"its split {entry.get('split')!r} is none of train, restval, val, test"
    number = NUMBER.search(str(entry["filename"]))
    if "cocoid" in entry and (number is None or str(int(number[1])) != str(entry["cocoid"])):
        return f"its id {entry['cocoid']} is not the number in {entry['filename']!r}"
    sentences = _sentences(entry)
    owners = [sentence.get("imgid", entry.get("imgid")) for sentence in sentences]
    other = next((owner for owner in owners if "imgid" in entry and owner != entry["imgid"]), None)
    if other is not None:
        return f"one of its captions belongs to the picture {other}"
    listed, present = entry.get("sentids"), [sentence.get("sentid") for sentence in sentences]
    if isinstance(listed, list) and listed != present:
        return f"it lists the captions {listed}, but has {present}"
    return ""
