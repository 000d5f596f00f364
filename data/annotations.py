"""Annotations written by others: JSON files, JSON lines and captions, with a reason for everything unusable."""

import json
from collections.abc import Iterator
from pathlib import Path

from crossflow.core.errors import UserError


def json_lines(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line number from 1, object) for each non-blank line; for a bad line, (number, reason)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, json_line(line, number, path.name)


def json_line(line: bytes, number: int, name: str) -> dict | str:
    """The object of line `number`, counted from 1, of the file `name`; for a bad line, the reason."""
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        return f"line {number} of {name} is not JSON: {error}"
    return value if isinstance(value, dict) else f"line {number} of {name} is not a JSON object"


def json_file(path: Path) -> object:
    """The content of a JSON file. Raises UserError with its name when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read as JSON: {error}.") from error


def clean_captions(values: object) -> tuple[str, ...]:
    """Captions from a string or a list of strings: white space becomes single blanks, empty captions are dropped.

    Raises ValueError for other types.

    >>> clean_captions(["  a red\\n cube ", "", None])
    ('a red cube',)
    """
    texts = [values] if isinstance(values, str) else [] if values is None else values
    if not isinstance(texts, list | tuple):
        raise ValueError(f"caption is {type(values).__name__}, not text")
    captions = []
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"caption is {type(text).__name__}, not text")
        # Half of a surrogate pair, as truncated JSON escapes leave it, can be neither encoded nor tokenized.
        whole = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        captions.append(" ".join(whole.split()))
    return tuple(caption for caption in captions if caption)
