"""`flickr:DIR`: Flickr8k and Flickr30k as published: a captions file, split lists and pictures.

Captions: NAME.jpg#0<tab>caption (Flickr8k.token.txt, results_20130124.token), or the table results.csv or captions.txt.
Folders with dataset_flickr8k.json or dataset_flickr30k.json are read by `karpathy:DIR`.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions
from crossflow.data.files import fullest_folder, with_links
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.readers.karpathy import FOLDERS
from crossflow.data.splits import SPLIT_WORDS, require_split

TOKEN_FILES = ("Flickr8k.token.txt", "results_20130124.token", "results.csv", "captions.txt")
LISTS = ("Flickr_8k.{}Images.txt", "flickr30k_{}.txt", "{}.txt")
TOKEN = re.compile(r"(?P<name>.+?)#\d+\t(?P<caption>.*)")


class FlickrReader(FileReader):
    """Pictures with five captions each. Without split lists, only `@all` is available."""

    prefix = "flickr"
    layout = (
        "a folder with Flickr8k.token.txt or results_20130124.token (or results.csv, captions.txt), the lists "
        "Flickr_8k.trainImages.txt, .devImages.txt, .testImages.txt (or train.txt, val.txt, test.txt), and the "
        "pictures in Flicker8k_Dataset/, flickr30k-images/ or images/"
    )
    offers = frozenset(("image", "captions"))

    def listing(self, path: Path, split: str) -> Listing:
        """The pictures of a split list with their captions."""
        file = next((path / name for name in TOKEN_FILES if (path / name).is_file()), None)
        if file is None:
            json = next((entry.name for entry in sorted(path.glob("dataset_*.json"))), "")
            hint = f" To read {json}, write 'karpathy:{path}'." if json else ""
            raise UserError(f"{self.spec!r} has none of {', '.join(TOKEN_FILES)}.{hint} Expected {self.layout}.")
        captions, malformed = read_tokens(file)
        lists = split_lists(path)
        if not lists and split != "all":
            raise UserError(
                f"{self.spec!r} has no split lists, and scores on other splits would not be comparable. Put "
                f"{LISTS[0].format('train')}, .dev and .test there (or train.txt, val.txt, test.txt), or write "
                f"'{self.spec}@all'."
            )
        require_split(self.spec, split, lists)
        names = list(captions) if split == "all" else _listed(lists[split])
        places = [*(path / folder for folder in FOLDERS), path]
        folder = fullest_folder(places, names)
        records = [
            Record(name, name, tuple(captions.get(name, ())), problem="" if captions.get(name) else "has no caption")
            for name in names
        ]
        if split == "all":
            records += malformed
        return Listing(folder, records, with_links(folder))

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The captions file, if its name is that of Flickr8k or Flickr30k."""
        return next((name for name in TOKEN_FILES[:2] if path.is_dir() and (path / name).is_file()), "")


def read_tokens(file: Path) -> tuple[dict[str, list[str]], list[Record]]:
    """(file name -> captions, records of the malformed lines). Raises UserError when the file has no captions."""
    captions: dict[str, list[str]] = {}
    malformed = []
    try:
        for number, name, caption in _rows(file):
            cleaned = clean_captions(caption)
            if not name or not cleaned:
                malformed.append(
                    Record(f"{file.name}:{number}", problem=f"line {number} of {file.name} has no caption")
                )
            else:
                captions.setdefault(name, []).extend(cleaned)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{str(file)!r} cannot be read: {error}.") from error
    if not captions:
        raise UserError(f"{str(file)!r} has no line of the form NAME.jpg#0<tab>caption.")
    return captions, malformed


def _rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, file name, caption); name and caption are "" for a malformed line."""
    with file.open(encoding="utf-8-sig", newline="") as opened:
        if file.name in TOKEN_FILES[:2]:
            for number, line in enumerate(opened, start=1):
                match = TOKEN.fullmatch(line.strip())
                if line.strip():
                    yield number, match["name"] if match else "", match["caption"] if match else ""
            return
        delimiter = "|" if file.name == "results.csv" else ","  # NAME.jpg| 0| caption, and image,caption
        rows = csv.reader(
            opened, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
        )
        next(rows, None)  # the header
        for number, row in enumerate(rows, start=2):
            if row:
                yield number, row[0].strip() if len(row) > 1 else "", row[-1] if len(row) > 1 else ""


def split_lists(path: Path) -> dict[str, Path]:
    """split -> its list of file names, of those that exist."""
    lists = {}
    for split, words in SPLIT_WORDS.items():
        files = (path / pattern.format(word) for pattern in LISTS for word in words)
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            lists[split] = file
    return lists


def _listed(file: Path) -> list[str]:
    """The file names of a list; those of Flickr30k lack the ending .jpg."""
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return [name if "." in name else f"{name}.jpg" for name in names]
