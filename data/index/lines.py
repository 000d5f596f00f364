"""Reads a file with one JSON object per line into tables, in parts, so that a killed process loses one part."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crossflow.core.progress import Progress
from crossflow.data.annotations import json_line
from crossflow.data.index import arrow
from crossflow.data.splits import rank

if TYPE_CHECKING:
    import pyarrow as pa

PART_BYTES = 2**24  # of the file
COLUMNS = {
    **{"name": "text", "captions": "texts", "split": "text", "problem": "text"},
    **{"has_captions": "bool", "malformed": "bool", "number": "uint64", "rank": "uint64"},
}


@dataclass(frozen=True, slots=True)
class Line:
    """What a line says about an image.

    Attributes:
        name: path of the image, or the name of a malformed line.
        captions: those of this line.
        split: the word for its split, "" if the line has none.
        problem: why the line cannot be used.
        has_captions: it has a place for captions, which may be empty.
        malformed: it names no image.
    """

    name: str
    captions: tuple[str, ...] = ()
    split: str = ""
    problem: str = ""
    has_captions: bool = False
    malformed: bool = False


Parse = Callable[[int, dict | str], Line]
"""(number of a line, its object or the reason why it has none) -> what it says."""


def read_parts(file: Path, folder: Path | None, parse: Parse, progress: Progress) -> "Iterator[pa.Table]":
    """The lines of the file, in tables with COLUMNS; `number` is that of a line, from 1, `rank` that of its name.

    folder: where the parts are written and, if an earlier attempt has written them, read; None keeps them in memory.
    progress: called with (bytes read, bytes of the file). Raises OSError.
    """
    size, offset, number, part = file.stat().st_size, 0, 0, 0
    with file.open("rb") as stream:
        while offset < size:
            path = folder / f"part-{part:06d}.arrow" if folder is not None else None
            table = _written(path) if path is not None else None
            if table is None:
                stream.seek(offset)
                lines = stream.readlines(PART_BYTES)
                batch = _read(lines, number, file.name, parse)
                offset, number = offset + sum(map(len, lines)), number + len(lines)
                if path is None:
                    table = arrow.table(COLUMNS, [batch])
                else:
                    table = arrow.write(path, COLUMNS, [batch], offset=offset, number=number)
            else:
                offset, number = (int(table.schema.metadata[name]) for name in (b"offset", b"number"))
            yield table
            part += 1
            progress(offset, size)


def _written(path: Path) -> "pa.Table | None":
    try:
        return arrow.read(path)
    except (OSError, ValueError):
        return None


def _read(lines: list[bytes], number: int, file: str, parse: Parse) -> "pa.RecordBatch":
    """What the lines after line `number` say."""
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    for place, content in enumerate(lines, start=number + 1):
        if not content.strip():
            continue
        line = parse(place, json_line(content, place, file))
        columns["name"].append(arrow.encode(line.name))
        columns["captions"].append([arrow.encode(caption) for caption in line.captions])
        columns["split"].append(arrow.encode(line.split))
        columns["problem"].append(arrow.encode(line.problem))
        columns["has_captions"].append(line.has_captions)
        columns["malformed"].append(line.malformed)
        columns["number"].append(place)
        columns["rank"].append(rank(line.name))
    return arrow.batch(COLUMNS, list(columns.values()))
