"""Merges the lines of an index into its rows: one per image, then the malformed lines; and divides them into splits.

The lines of an image are joined by a 64-bit digest of its name, which takes some tens of bytes of memory per line.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from crossflow.data.index import arrow
from crossflow.data.splits import SPLIT_WORDS, hashed_split, split_word

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {"name": "text", "captions": "texts", "problem": "text"}
CHUNK = 2**16  # images that are merged together
BAD, PICTURE, CAPTIONS = 1, 2, 4  # flags of a row: it has a problem, it names an image, it has captions
EVERY, OTHER = 3, 4  # splits of a row beside the positions in SPLIT_WORDS


class Merged:
    """The rows of the index of `file`, from its lines in the tables `parts`; see `lines.read_parts`.

    `batches` makes the rows, in COLUMNS; afterwards `arrays` and `about` have what is known of them.
    """

    def __init__(self, parts: "Sequence[pa.Table]", file: str) -> None:
        self.parts, self.file = parts, file
        self.starts = np.cumsum([0, *(part.num_rows for part in parts)])
        self.ranks = self._column("rank")
        self.malformed = self._column("malformed").astype(bool)
        self.with_captions = bool(self._column("has_captions").any())
        self.with_splits = any(any(part["split"].unique().to_pylist()) for part in parts)
        self.other_splits: Counter[str] = Counter()
        self.num_images: dict[str, int] = {}
        self._rows: list[np.ndarray] = []  # of each batch: rank, flags and split of its rows, uint64 (3, rows)

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([part[name].to_numpy() for part in self.parts] or [np.empty(0, np.uint64)])

    def batches(self) -> "Iterator[pa.RecordBatch]":
        """The rows, in the order of the file."""
        places, firsts = self._by_image()
        for start in range(0, len(firsts), CHUNK):
            begin, end = firsts[start], firsts[start + CHUNK] if start + CHUNK < len(firsts) else len(places)
            lines = self._lines(places[begin:end])
            bounds = [*(firsts[start : start + CHUNK] - begin).tolist(), len(lines)]
            images = [image for a, b in pairwise(bounds) for image in self._images(lines[a:b])]
            yield self._batch(images)
        places = np.flatnonzero(self.malformed)
        known = np.isin(self.ranks[places], self.ranks[~self.malformed])  # an image has the name of a malformed line
        for start in range(0, len(places), CHUNK):
            chunk = slice(start, start + CHUNK)
            yield self._batch(
                [
                    (line["name"] + b"#2" * bool(again), [], line["problem"], line["rank"], 0, EVERY)
                    for line, again in zip(self._lines(places[chunk]), known[chunk], strict=True)
                ]
            )

    def _by_image(self) -> tuple[np.ndarray, np.ndarray]:
        """(the lines, those of an image together, where each image begins in it), both in the order of the file."""
        places = np.flatnonzero(~self.malformed)
        _, first, image = np.unique(self.ranks[places], return_index=True, return_inverse=True)
        owner = first[image]  # of each line: the first line of its image
        order = np.argsort(owner, kind="stable")
        return places[order], np.flatnonzero(np.diff(owner[order], prepend=-1))

    def _lines(self, places: np.ndarray) -> list[dict[str, Any]]:
        """These lines, in this order."""
        lines: list[Any] = [None] * len(places)
        owners = np.searchsorted(self.starts, places, side="right") - 1
        for owner in np.unique(owners).tolist():
            slots = np.flatnonzero(owners == owner)
            chosen = self.parts[owner].take(places[slots] - self.starts[owner])
            columns = {
                name: column.to_pylist() for name, column in zip(chosen.column_names, chosen.columns, strict=True)
            }
            for number, slot in enumerate(slots.tolist()):
                lines[slot] = {name: values[number] for name, values in columns.items()}
        return lines

    def _images(self, lines: list[dict[str, Any]]) -> list[tuple]:
        """The rows of lines with the same rank, almost always of one image: COLUMNS, rank, flags and split."""
        images: dict[bytes, dict[str, Any]] = {}
        for line in lines:
            image = images.setdefault(line["name"], {**line, "captions": [], "problem": b""})
            if image["split"] and line["split"] and line["split"] != image["split"]:
                words = " and ".join(repr(arrow.decode(word)) for word in (image["split"], line["split"]))
                image["problem"] = arrow.encode(f"is in the splits {words} (line {line['number']} of {self.file})")
            image["split"] = image["split"] or line["split"]
            image["problem"] = line["problem"] or image["problem"]
            image["captions"] += line["captions"]
        return [self._row(image) for image in images.values()]

    def _row(self, image: dict[str, Any]) -> tuple:
        problem = image["problem"]
        if self.with_splits and not image["split"]:
            problem = problem or b"has no split, but other lines have one"
        if self.with_captions and not image["captions"]:
            problem = problem or b"all its captions are empty"
        return image["name"], image["captions"], problem, image["rank"], PICTURE, self._split(image["split"])

    def _split(self, name: bytes) -> int:
        """Where a row belongs. Images without a split are bad items of every split, so that none hides them."""
        if not name:
            return EVERY
        word = split_word(arrow.decode(name))
        if not word:
            self.other_splits[arrow.decode(name)] += 1
        return list(SPLIT_WORDS).index(word) if word else OTHER

    def _batch(self, rows: list[tuple]) -> "pa.RecordBatch":
        names, captions, problems, ranks, flags, splits = zip(*rows, strict=True)
        marks = [
            flag | BAD * bool(bad) | CAPTIONS * bool(texts)
            for flag, bad, texts in zip(flags, problems, captions, strict=True)
        ]
        self._rows.append(np.array([ranks, marks, splits], np.uint64))
        return arrow.batch(COLUMNS, [names, captions, problems])

    def arrays(self, table: "pa.Table") -> dict[str, np.ndarray]:
        """`flags` uint8 (rows,), and `train`, `val` and `test`: the rows of each split, int64, ascending."""
        ranks, flags, splits = np.concatenate([np.empty((3, 0), np.uint64), *self._rows], axis=1)
        if not self.with_splits:
            images = np.flatnonzero(flags & np.uint64(PICTURE))
            splits[images] = hashed_split(ranks[images], lambda row: arrow.decode(table["name"][row].as_py()))
        pictures = splits[(flags & np.uint64(PICTURE)) > 0]
        self.num_images = {split: int(np.sum(pictures == number)) for number, split in enumerate(SPLIT_WORDS)}
        self.num_images["other"] = len(pictures) - sum(self.num_images.values())
        members = {
            split: np.flatnonzero((splits == number) | (splits == EVERY)) for number, split in enumerate(SPLIT_WORDS)
        }
        return {"flags": flags.astype(np.uint8), **members}

    @property
    def about(self) -> dict[str, Any]:
        """What messages say of the splits, as JSON."""
        return {
            "with_splits": self.with_splits,
            "num_images": self.num_images,  # by split; "other" are those of no split or another one
            "other_splits": dict(self.other_splits),
        }
