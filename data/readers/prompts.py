"""`prompts:FILE`: a text file with one prompt per line, for features of text alone."""

from pathlib import Path

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions
from crossflow.data.item import Item, Record
from crossflow.data.reader import FileReader, Listing


class PromptsReader(FileReader):
    """Captions without pictures, one per line. All lines are the split train."""

    prefix = "prompts"
    layout = "a text file in UTF-8 with one prompt per line"
    offers = frozenset(("captions",))

    def listing(self, path: Path, split: str) -> Listing:
        """The lines of the file."""
        if split not in ("train", "all"):
            raise UserError(f"{self.spec!r} is a list of prompts, which has no split {split!r}: all lines are 'train'.")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.spec!r} is not a text file in UTF-8: {error}.") from error
        prompts = [caption for line in lines for caption in clean_captions(line)]
        return Listing(path.parent, [Record(f"{number:06d}", captions=(text,)) for number, text in enumerate(prompts)])

    def __getitem__(self, index: int) -> Item:
        return Item(self.records[index].id, captions=self.records[index].captions)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The name of a .txt file."""
        return path.name if path.is_file() and path.suffix.lower() == ".txt" else ""
