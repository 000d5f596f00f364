"""`mjhq:DIR`: MJHQ-30K (Li et al. 2024), 30,000 pictures with the prompts that generated them, in ten categories.

meta_data.json: {ID: {"category", "prompt"}}; the pictures, of mjhq30k_imgs.zip, are CATEGORY/ID.jpg.
"""

from collections.abc import Mapping
from pathlib import Path

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions, json_file
from crossflow.data.files import fullest_folder
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.splits import split_by_hash

META, FOLDER = "meta_data.json", "mjhq30k_imgs"


class MjhqReader(FileReader):
    """The published set has no splits and is scored as a whole (`all`); train, val and test come from a hash."""

    prefix = "mjhq"
    layout = f"a folder with {META} and the pictures of {FOLDER}.zip, CATEGORY/ID.jpg, in it or in {FOLDER}/"
    offers = frozenset(("image", "captions"))

    def listing(self, path: Path, split: str) -> Listing:
        """The pictures with their prompts."""
        file = path / META
        if not file.is_file():
            raise UserError(f"{self.spec!r} has no {META}. Expected {self.layout}.")
        content = json_file(file)
        if not isinstance(content, Mapping) or not content:
            raise UserError(
                f"{str(file)!r} is not the file of MJHQ-30K: it must be an object {{ID: {{category, prompt}}}}."
            )
        members = split_by_hash(self.spec, content, split)
        records = [_record(id, entry) for id, entry in content.items() if id in members]
        folder = fullest_folder([path, path / FOLDER], [record.image for record in records])
        return Listing(folder, records)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The metadata beside the pictures' folder."""
        return f"{META} and {FOLDER}/" if (path / META).is_file() and (path / FOLDER).is_dir() else ""


def _record(id: str, entry: object) -> Record:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("category"), str):
        return Record(id, problem="has no category, which names the folder of its picture")
    try:
        captions = clean_captions(entry.get("prompt"))
    except ValueError as error:
        return Record(id, problem=str(error))
    return Record(id, f"{entry['category']}/{id}.jpg", captions, problem="" if captions else "has no prompt")
