"""`hf:NAME`: anything that the library `datasets` reads: data sets of the Hugging Face hub, folders of Parquet files or
pictures, and the output of `save_to_disk`. Local folders need no network.

Columns are recognised by their types and names, or set by options: `hf:NAME?image=img&caption=text`.
"""

import hashlib
import io
import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from crossflow.core.errors import PARSING_ERRORS, UserError
from crossflow.data.annotations import clean_captions
from crossflow.data.files import existing
from crossflow.data.item import BadItem, Item
from crossflow.data.reader import Reader
from crossflow.data.readers.jsonl import CAPTION_KEYS
from crossflow.data.records import LazyIds
from crossflow.data.spec import Option, Options, parse_options, split_location
from crossflow.data.splits import choose, hashed_members, published_split, require_split, select_split, split_word

Rows = Any  # a `datasets.Dataset` or a `_Stream`; the library's types are imported late

logger = logging.getLogger(__name__)

CAPTIONS = (*CAPTION_KEYS, "txt", "sentences", "sentence", "sentences_raw", "description", "alt_text")
DEPTHS = ("depth", "depth_map", "depth_image")


class HfReader(Reader):
    """Pictures with captions or depth.

    Splits are those of the data set (`validation` is val). If it has `train` and `test` only, 2 % of the training rows
    are val (see `splits.select_split`); if it has nothing but `train`, a hash of the items' names divides it.

    `stream=N` takes the first N rows of a split without downloading the rest, and holds them (encoded) in memory, so
    they are shuffled, divided and resumed like any other data.
    """

    prefix = "hf"
    layout = "the name of a data set on the Hugging Face hub, or a folder that the library `datasets` reads"
    offers = frozenset(("image", "captions", "depth"))
    options: ClassVar[Options] = {
        "config": Option("configuration of the data set"),
        "revision": Option("branch, tag or commit of the data set"),
        "image": Option("column of the pictures"),
        "caption": Option("column of the captions"),
        "depth": Option("column of the depth maps"),
        "id": Option("column of the items' names (row numbers if not set)"),
        "units": Option("value of one metre in 16-bit depth", "1000", number=True),
        "stream": Option("number of rows to take, without downloading the rest", "none", number=True),
    }

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        self.spec, self.split = f"{self.prefix}:{location}", split
        self.place, settings = split_location(location)
        self.option = parse_options(settings, self.options, self.spec)
        if not self.place:
            raise UserError(f"{self.spec!r} has no name: write hf:NAME with {self.layout}.")
        parts = self._parts()
        words = {split_word(name) or name: name for name in parts}
        # A lone `train` is divided; a lone `test` is scored as a whole.
        self.hashed = len(parts) == 1 and split != "all" and not {"val", "test"} & set(words)
        published = published_split(split, words)
        if not self.hashed:
            require_split(self.spec, published, words)
        names = list(parts) if split == "all" or self.hashed else [words[published]]
        self.data = {name: self._open_part(name, parts[name]) for name in names}
        self.columns = self._columns(next(iter(self.data.values())))
        self._starts = [0, *accumulate(len(data) for data in self.data.values())]
        self.indices: Sequence[int] | np.ndarray = range(self._starts[-1])  # of the items among the rows of all splits
        self.ids: Sequence[str] = _Ids(self, self._names())
        if self.hashed:
            self.indices = hashed_members(self.spec, self.ids, split)
        else:
            self.indices = select_split(self.ids, split, words)
        if limit is not None and limit < len(self.indices):
            self.indices = np.asarray(self.indices)[choose(self.ids, limit, seed)]
        if not len(self.indices):
            raise UserError(f"{self.spec!r} has no rows in split {split!r}.")
        fields = {"image": "image", "caption": "captions", "depth": "depth"}
        self.fields = frozenset(fields[key] for key in self.columns)

    # -- opening

    def _parts(self) -> dict[str, Any]:
        """split -> its rows, or None when they are not opened yet."""
        import datasets

        folder = existing(self.place)
        streamed = self.option["stream"] != "none"
        try:
            if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                data = datasets.load_from_disk(str(folder))
                return dict(data) if isinstance(data, dict) else {str(data.split or "train"): data}
            arguments = self._arguments()
            if streamed:
                return dict(datasets.load_dataset(self.place, streaming=True, **arguments))
            return dict.fromkeys(
                datasets.get_dataset_split_names(self.place, arguments["name"], revision=arguments["revision"])
            )
        except _errors() as error:
            raise self._open_error(error) from error

    def _arguments(self) -> dict[str, str | None]:
        return {"name": self.option["config"] or None, "revision": self.option["revision"] or None}

    def _open_part(self, name: str, part: Rows | None) -> Rows:
        """The rows of a split, with pictures left encoded."""
        import datasets

        try:
            part = datasets.load_dataset(self.place, split=name, **self._arguments()) if part is None else part
            for column, feature in (part.features or {}).items():
                if isinstance(feature, datasets.Image):
                    part = part.cast_column(column, datasets.Image(decode=False))
            if self.option["stream"] == "none":
                return part
            count = int(float(self.option["stream"]))
            if isinstance(part, datasets.Dataset):
                return part.select(range(min(count, len(part))))
            return _Stream(list(part.take(count)), part.features)
        except _errors() as error:
            raise self._open_error(error) from error

    def _open_error(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        return UserError(
            f"{self.spec!r} cannot be opened by the library `datasets`: {reason}. Check the name; without network "
            "access, give the folder of a local copy."
        )

    def _columns(self, data: Rows) -> dict[str, str]:
        """image, caption, depth -> column, of the columns that exist."""
        import datasets

        features: Mapping[str, Any] = data.features or dict.fromkeys(data[0] if len(data) else {})
        pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        columns = {
            "image": next((name for name in ("image", "img", "jpg", "png") if name in pictures), "")
            or next((name for name in pictures if name not in DEPTHS), ""),
            "caption": next((name for name in CAPTIONS if name in features and name not in pictures), ""),
            "depth": next((name for name in DEPTHS if name in features), ""),
        }
        for key in columns:
            name = self.option[key]
            if name and name not in features:
                raise UserError(f"{self.spec!r} has no column {name!r}; it has {', '.join(features)}.")
            columns[key] = name or columns[key]
        if not any(columns.values()):
            raise UserError(
                f"{self.spec!r}: no column is recognisable as pictures or captions ({', '.join(features)}). "
                "Name them: ?image=COLUMN&caption=COLUMN."
            )
        return {key: column for key, column in columns.items() if column}

    def _names(self) -> list[str] | None:
        """The names of all rows, where a column has them."""
        column = self.option["id"]
        if not column:
            return None
        names: list[str] = []
        for data in self.data.values():
            if column not in (data.features or {column: None}):
                raise UserError(
                    f"{self.spec!r} has no column {column!r} for the names; it has {', '.join(data.features)}."
                )
            part = [str(value) for value in data[column]]
            if len(set(part)) < len(part):
                raise UserError(
                    f"{self.spec!r}: column {column!r} gives several rows the same name; names must be unique."
                )
            names += part
        return names

    def row(self, index: int) -> tuple[str, int]:
        """(split, row in it) of item `index`."""
        place = int(self.indices[index])
        number = bisect_right(self._starts, place) - 1
        return list(self.data)[number], place - self._starts[number]

    # -- reading

    def __getitem__(self, index: int) -> Item:
        id, (name, row) = self.ids[index], self.row(index)
        try:
            values = self.data[name][row]
            image, grey = self._image(values)
            captions = clean_captions(_texts(values.get(self.columns.get("caption", ""))))
            depth = self._depth(values)
            lacking = {"captions": not captions, "depth": depth is None}
            missing = [field for field, lacks in lacking.items() if lacks and field in self.required]
            if missing:
                raise ValueError(f"has no {' and no '.join(missing)}")
            if image is not None and depth is not None and depth.shape != image.shape[:2]:
                raise ValueError(f"depth is {depth.shape}, the image {image.shape[:2]} pixels (height, width)")
        except (ValueError, TypeError, OSError) as error:
            raise BadItem(id, str(error)) from error
        return Item(id, image, captions, depth, grey=grey)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of item `index`, without its picture; none when they are unreadable."""
        column = self.columns.get("caption")
        if column is None:
            return ()
        name, row = self.row(index)
        data = self.data[name]
        values = data[row] if isinstance(data, _Stream) else data.select_columns([column])[row]
        try:
            return clean_captions(_texts(values[column]))
        except ValueError:
            return ()

    def _image(self, values: Mapping[str, Any]) -> tuple[np.ndarray | None, bool]:
        """The image uint8 (H, W, 3), if the rows have any, and whether its file stores a single channel."""
        from crossflow.data.images import is_grey, load_image

        if "image" not in self.columns:
            return None, False
        content = _encoded(values[self.columns["image"]], self.place)
        image = load_image(content)
        return image, is_grey(image, content)

    def _depth(self, values: Mapping[str, Any]) -> np.ndarray | None:
        from PIL import Image

        from crossflow.data.images import load_depth_png

        value = values.get(self.columns.get("depth", ""))
        if value is None:
            return None
        if isinstance(value, Mapping):
            content = _encoded(value, self.place)
            with Image.open(io.BytesIO(content), formats=("PNG", "TIFF")) as image:
                value = np.array(image) if image.mode == "F" else None
            if value is None:
                return load_depth_png(content, units_per_metre=float(self.option["units"]))
        metres = np.asarray(value, dtype=np.float32).squeeze()
        if metres.ndim != 2:
            raise ValueError(f"depth has the shape {metres.shape}, not (height, width)")
        return np.where(np.isfinite(metres) & (metres > 0), metres, 0).astype(np.float32)

    def fingerprint(self) -> str:
        """From the options, all names, and the content of up to 256 rows."""
        settings = {key: self.option[key] for key in ("config", "units")} | self.columns
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        digest.update(json.dumps(list(self.ids)).encode())
        for name, row in map(self.row, range(0, len(self.ids), -(-len(self.ids) // 256))):
            values = self.data[name][row]
            for column in self.columns.values():
                value = values[column]
                digest.update(_encoded(value, self.place) if isinstance(value, Mapping) else repr(value).encode())
        return digest.hexdigest()

    @classmethod
    def recognise(cls, path: Path) -> str:
        """The file that `save_to_disk` writes."""
        names = ("dataset_dict.json", "state.json") if path.is_dir() else ()
        return next((name for name in names if (path / name).is_file()), "")


class _Ids(LazyIds):
    """The names of a column, or row numbers; after the name of their split if there are several."""

    def __init__(self, reader: HfReader, names: Sequence[str] | None) -> None:
        self.reader, self.names = reader, names

    def __len__(self) -> int:
        return len(self.reader.indices)

    def id_at(self, index: int) -> str:
        """The name of item `index`."""
        split, row = self.reader.row(index)
        name = self.names[int(self.reader.indices[index])] if self.names is not None else f"{row:08d}"
        return f"{split}/{name}" if len(self.reader.data) > 1 else name


class _Stream:
    """The first rows of a stream, in memory."""

    def __init__(self, rows: list[dict[str, Any]], features: Mapping[str, object] | None) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return self.rows[key] if isinstance(key, int) else [row[key] for row in self.rows]


def _encoded(value: object, place: str) -> bytes:
    """The bytes of a picture that was left encoded: {"bytes", "path"}.

    The library names pictures in archives and on the hub by chained addresses: zip://a.png::/data/train.zip. A row may
    name any file, so only files on the hub, in the library's cache and below `place` are read. Raises ValueError.
    """
    if not isinstance(value, Mapping):
        raise ValueError("has no picture" if value is None else f"its picture is {type(value).__name__}, not a file")
    if value.get("bytes"):
        return value["bytes"]
    if value.get("path"):
        import fsspec

        end = str(value["path"]).rpartition("::")[2]
        if not end.startswith("hf://") and not _is_below(end, place):
            raise ValueError(f"its picture {end!r} lies outside of the data; only files of the data are read")
        try:
            with fsspec.open(value["path"], "rb") as file:
                return file.read()
        except _errors() as error:
            raise ValueError(f"{value['path']} cannot be read: {error}") from error
    raise ValueError("has no picture")


def _is_below(file: str, place: str) -> bool:
    """Whether an address is a local file in the data's folder, or in a cache of the library."""
    import datasets
    from fsspec.implementations.local import LocalFileSystem
    from huggingface_hub.constants import HF_HUB_CACHE

    if "://" in file:
        return False
    file = LocalFileSystem._strip_protocol(file)  # as fsspec opens it: without "file:", with "~" expanded
    folder = existing(place)
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    folders = [*map(Path, caches), *([folder if folder.is_dir() else folder.parent] if folder is not None else [])]
    return any(Path(file).resolve().is_relative_to(Path(parent).resolve()) for parent in folders)


def _texts(value: object) -> object:
    """Captions as a string or a list of strings; COCO-like rows hold {"raw": ...} objects."""
    if isinstance(value, Mapping):
        return value.get("raw")
    if isinstance(value, list):
        return [text.get("raw") if isinstance(text, Mapping) else text for text in value]
    return value


def _errors() -> tuple[type[Exception], ...]:
    """What `datasets` and the file systems below it raise: no network, unknown name, wrong folder, damaged file."""
    from datasets.exceptions import DatasetsError

    return (*PARSING_ERRORS, ImportError, DatasetsError)
