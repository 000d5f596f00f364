"""`folder:DIR`: images anywhere below a folder; captions, if there, in NAME.txt, metadata.jsonl or captions.json."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from crossflow.core.errors import UserError
from crossflow.data.annotations import clean_captions, json_file, json_lines
from crossflow.data.files import has_many, image_files, inside, leaves, walk
from crossflow.data.index.listing import MANY
from crossflow.data.item import Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.readers.jsonl import CAPTION_KEYS, IMAGE_KEYS, captions_of
from crossflow.data.splits import require_split, split_by_hash, split_folders

METADATA = ("metadata.jsonl", "captions.json")


class FolderReader(FileReader):
    """Images, recursively. Splits are the sub-folders train/, val/ and test/ if any exists, else a hash of the names.

    Captions of a.jpg: the lines of a.txt, and those in metadata.jsonl or captions.json of DIR or the split's folder.
    """

    prefix = "folder"
    layout = (
        "a folder of images, optionally sorted into train/, val/ and test/, with captions in NAME.txt beside NAME.jpg, "
        'in metadata.jsonl ({"file_name", "caption"} per line) or in captions.json ({"NAME.jpg": [captions]})'
    )
    offers = frozenset(("image", "captions"))

    def listing(self, path: Path, split: str) -> Listing:
        """All images below the folder of the split."""
        if not path.is_dir():
            raise UserError(f"{self.spec!r}: {str(path)!r} is a file. Expected {self.layout}.")
        folders = split_folders(path)
        if not folders:
            entries = _entries(path, [path], self.spec)
            members = split_by_hash(self.spec, (name for name, entry in entries.items() if not entry.malformed), split)
            records = [entry.record(name) for name, entry in entries.items() if name in members or entry.malformed]
            return Listing(path, records)
        require_split(
            self.spec, split, folders, f"no folder {split}/ beside {', '.join(f.name for f in folders.values())}"
        )
        selected = [folder for name, folder in folders.items() if split in (name, "all")]
        entries = _entries(path, selected, self.spec)
        return Listing(path, [entry.record(name) for name, entry in entries.items()], (path, *selected))

    def is_large(self, path: Path) -> bool:
        """Whether there are many files."""
        return path.is_dir() and has_many(path, MANY)

    def watched(self, path: Path) -> Iterator[Path]:
        """The folders, and the files that hold captions."""
        for parent, files, _ in walk(path):
            yield parent
            yield from (parent / name for name in files if name.endswith(".txt") or name in METADATA)

    @classmethod
    def recognise(cls, path: Path) -> str:
        """Any image."""
        return "images in it" if path.is_dir() and image_files(path) else ""


@dataclass
class Entry:
    """What is known about one image before it is read."""

    path: str = ""
    captions: list[str] = field(default_factory=list)
    problem: str = ""
    malformed: bool = False  # a line of metadata without a usable image name, which is in every split

    def record(self, name: str) -> Record:
        """The record of this image, with the id `name`."""
        return Record(name, self.path, tuple(self.captions), problem=self.problem)


def _entries(root: Path, folders: list[Path], spec: str) -> dict[str, Entry]:
    """name relative to `root` -> image, for the images in `folders` and those that metadata there or in `root` name."""
    entries: dict[str, Entry] = {}
    for folder in folders:
        prefix = folder.relative_to(root)
        for name in image_files(folder):
            entry = Entry((prefix / name).as_posix())
            entries[entry.path] = entry
            _add_text_file(entry, root, (root, folder))
    if not entries:
        raise UserError(f"{spec!r} has no images in {', '.join(repr(str(folder)) for folder in folders)}.")
    for place in dict.fromkeys((root, *folders)):
        for name, described in _metadata(place):
            if described.malformed:
                entries[name] = described
                continue
            name = (place.relative_to(root) / name).as_posix()
            if name not in entries and not any((root / name).is_relative_to(folder) for folder in folders):
                continue  # an image of another split
            entry = entries.setdefault(name, Entry(name))
            entry.captions += described.captions
            entry.problem = entry.problem or described.problem
    return entries


def _add_text_file(entry: Entry, root: Path, allowed: tuple[Path, ...]) -> None:
    name = str(PurePosixPath(entry.path).with_suffix(".txt"))
    if not (root / name).exists():
        return
    try:
        path = inside(root, name, [folder.resolve() for folder in allowed])
        entry.captions += clean_captions(path.read_text(encoding="utf-8-sig").splitlines())
    except (ValueError, OSError) as error:
        entry.problem = f"captions: {error}"
        return
    if not entry.captions:
        entry.problem = f"{name!r} has no caption"


def _metadata(place: Path) -> Iterator[tuple[str, Entry]]:
    """(image name relative to `place`, its captions) from metadata.jsonl and captions.json in `place`."""
    lines = place / "metadata.jsonl"
    if lines.is_file():
        for number, line in json_lines(lines):
            label = f"{lines.name}:{number}"
            if isinstance(line, str):
                yield label, Entry(problem=line, malformed=True)
            else:
                yield _parse_line(line, label)
    listed = place / "captions.json"
    if listed.is_file():
        content = json_file(listed)
        if isinstance(content, Mapping) and "annotations" in content:
            raise UserError(
                f"{str(listed)!r} is in COCO's format: rename it to captions_train.json and write 'coco:{place}'."
            )
        if isinstance(content, Mapping):
            for name, captions in content.items():
                yield _parse_line({"file_name": name, "captions": captions}, f"{listed.name}:{name}")
        elif isinstance(content, list):
            for number, line in enumerate(content):
                yield _parse_line(line, f"{listed.name}[{number}]")
        else:
            raise UserError(
                f"{str(listed)!r} must be an object {{name: captions}} or a list of {{file_name, captions}} objects."
            )


def _parse_line(line: object, label: str) -> tuple[str, Entry]:
    """(image name, its captions) of one object; (`label`, a malformed entry) when it names no image."""
    value = next((line[key] for key in IMAGE_KEYS if key in line), None) if isinstance(line, Mapping) else None
    if not isinstance(line, Mapping) or not isinstance(value, str) or not value:
        return label, Entry(problem=f"{label} names no image", malformed=True)
    name = str(PurePosixPath(value))
    if leaves(name):
        return label, Entry(problem=f"{label}: path {name!r} leaves the data folder", malformed=True)
    try:
        captions = captions_of(line)
    except ValueError as error:
        return name, Entry(problem=f"{label}: {error}")
    empty = not captions and any(key in line for key in CAPTION_KEYS)
    return name, Entry(captions=list(captions), problem=f"{label}: all captions are empty" if empty else "")
