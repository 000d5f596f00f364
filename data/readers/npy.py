"""`npy:DIR`: feature folders of the released CrossFlow scripts, one .npy file per sample, read without running them.

Such a file holds a pickled dictionary of arrays, and a pickle is a program. Here it is not run: the few instructions
that build plain values and numeric arrays are followed one by one by `read_pickled`, and any other is refused.
"""

import math
import pickletools
import re
import tokenize
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crossflow.core.errors import PARSING_ERRORS, UserError
from crossflow.data.annotations import json_lines
from crossflow.data.files import inside
from crossflow.data.item import BadItem, Item, Record
from crossflow.data.reader import FileReader, Listing
from crossflow.data.splits import split_by_hash

LARGEST_FILE = 2**28  # bytes; the released ones have 1.7 MB
NUMBERS = re.compile(r"[<>|=]?([fiub])(1|2|4|8)")
CAPTIONS = ("batch_caption", "promt", "prompt", "caption")
ARRAYS = ("image_latent_", "token_embedding", "token_mask")
ONE_OF_SEVERAL = re.compile(r"(\d+)_(\d+)")


class NpyReader(FileReader):
    """Items with features, for `crossflow cache` to take over: `released` names the arrays of each.

    A training folder (img_text_pair.jsonl, imgs/, features/) gives pictures too. In a validation folder N.npy holds the
    moments of picture N, N_0.npy, N_1.npy, ... its captions.
    """

    prefix = "npy"
    layout = (
        "a folder of .npy files written by the released CrossFlow scripts, or one with features/ and imgs/ in it "
        "(import it by crossflow cache)"
    )
    offers = frozenset(("image", "captions", "released"))

    def __init__(
        self, location: str, split: str, *, image_size: int | None = None, limit: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(location, split, image_size=image_size, limit=limit, seed=seed)
        self.size = image_size
        with_images = any(record.image for record in self.records)
        self.fields = frozenset({"captions", "released"} | ({"image"} if with_images else set()))

    def listing(self, path: Path, split: str) -> Listing:
        root = path if path.is_dir() else path.parent
        folder = root / "features" if (root / "features").is_dir() else root
        names = sorted(file.stem for file in folder.glob("*.npy"))
        several = {name for name in names if (m := ONE_OF_SEVERAL.fullmatch(name)) and m[1] in names}
        names = [name for name in names if name != "empty_context" and f"{name}_0" not in several]
        if not names:
            raise UserError(f"{self.spec!r} has no .npy files. Expected {self.layout}.")
        members = split_by_hash(self.spec, names, split)
        images = _images(root)
        prefix = folder.relative_to(root)
        # `depth` carries the feature file: it is the second file of a record.
        records = [
            Record(name, images.get(name, ""), depth=(prefix / f"{name}.npy").as_posix())
            for name in names
            if name in members
        ]
        return Listing(root, records, (root, folder, *([root / "imgs"] if (root / "imgs").is_dir() else [])))

    def __getitem__(self, index: int) -> Item:
        from crossflow.data.images import load_image

        record = self.records[index]
        try:
            found = read_npy(inside(self.root, record.depth, self.allowed))
            if not isinstance(found, dict):
                raise ValueError(f"it holds {type(found).__name__}, not a dictionary")
            caption = next((found[name] for name in CAPTIONS if isinstance(found.get(name), str)), None)
            if caption is None:
                raise ValueError(f"it has no caption under {', '.join(CAPTIONS)}")
            arrays = {
                name: value
                for name, value in found.items()
                if name.startswith(ARRAYS) and isinstance(value, np.ndarray)
            }
            arrays |= self._moments_beside(record)
            image = load_image(inside(self.root, record.image, self.allowed)) if record.image else None
        except (ValueError, OSError) as error:
            raise BadItem(record.id, str(error)) from error
        return Item(record.id, image, (caption,), features=arrays)

    def _moments_beside(self, record: Record) -> dict[str, np.ndarray]:
        """Of a validation folder, whose pictures have files of their own."""
        match = ONE_OF_SEVERAL.fullmatch(record.id)
        beside = Path(record.depth).with_name(f"{match[1]}.npy").as_posix() if match else ""
        if not beside or not (self.root / beside).is_file():
            return {}
        moments = read_npy(inside(self.root, beside, self.allowed))
        if not isinstance(moments, np.ndarray) or moments.ndim != 3:
            raise ValueError(f"{beside} does not hold moments (2C, h, w)")
        return {f"image_latent_{8 * moments.shape[-1]}": moments}  # the released autoencoder shrinks 8 times

    def with_required(self, fields: Collection[str]) -> "NpyReader":
        """Whether an item has what is needed is known when its file is read."""
        assert self.fields.issuperset(fields)
        return self

    def captions(self, index: int) -> tuple[str, ...]:
        try:
            return self[index].captions
        except BadItem:
            return ()

    @classmethod
    def recognise(cls, path: Path) -> str:
        there = path.is_dir() and any(any(place.glob("*.npy")) for place in (path, path / "features"))
        return ".npy files" if there else ""


def _images(root: Path) -> dict[str, str]:
    """Name of a feature file without ending -> its picture, as img_text_pair.jsonl says."""
    file = root / "img_text_pair.jsonl"
    if not file.is_file() or not (root / "imgs").is_dir():
        return {}
    lines = (line for _, line in json_lines(file) if isinstance(line, dict))
    paths = [line["img_path"] for line in lines if isinstance(line.get("img_path"), str)]
    return {Path(path).stem: (Path("imgs") / path).as_posix() for path in paths}


# -- .npy files and pickles


def read_npy(path: Path) -> Any:
    """The array in a .npy file; of one that holds a pickled object, the object: plain values and numeric arrays.

    Raises UserError when the pickle asks for anything else, ValueError when the file is damaged.
    """
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path.name} has more than {LARGEST_FILE} bytes")
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except (*PARSING_ERRORS, tokenize.TokenError) as error:
            raise ValueError(f"{path.name} is no .npy file: {error}") from error
        if dtype.hasobject:
            if shape != ():
                raise ValueError(f"{path.name} holds {shape} objects, not one dictionary")
            return read_pickled(file, path)
        if math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{path.name} is cut: it should hold {shape} {dtype}")
    return np.load(path, allow_pickle=False)


class Symbol(str):
    """A name that a pickle asks for, `module name`; nothing is imported."""


class Made:
    """What a pickle asks to be made: one of the things in `_MADE`, with its state."""

    def __init__(self, what: Symbol, arguments: tuple) -> None:
        self.what, self.arguments = what, arguments
        self.state: tuple = ()


ARRAY, DTYPE = Symbol("numpy ndarray"), Symbol("numpy dtype")
RECONSTRUCT = Symbol("numpy _reconstruct")
SYMBOLS = {
    **{f"{module}.multiarray _reconstruct": RECONSTRUCT for module in ("numpy.core", "numpy._core")},
    "numpy ndarray": ARRAY,
    "numpy dtype": DTYPE,
}
MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
VALUES = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE", "UNICODE"),
        *("BINBYTES", "BINBYTES8", "SHORT_BINBYTES"),
    )
)
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickled(file: BinaryIO, path: Path) -> Any:
    """Follows the pickle that `file` stands at, without running it: dictionaries, lists, texts, numbers, arrays.

    Raises UserError that names what else it asks for, ValueError when it is damaged.
    """
    machine = _Machine(path)
    try:
        for opcode, argument, _ in pickletools.genops(file.read()):  # a length that is claimed is not allocated
            if opcode.name == "STOP":
                return {key: _plain(value) for key, value in machine.top_dictionary().items()}
            machine.follow(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged: {type(error).__name__} {error}") from error
    raise ValueError(f"{path.name} is damaged: it has no end")


class _Machine:
    """The stack and the memory that a pickle's instructions work on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def top_dictionary(self) -> dict[str, Any]:
        value = self.stack.pop()
        if isinstance(value, Made):  # np.save wraps the dictionary in an array of one object
            value = value.state[4][0] if value.what == RECONSTRUCT else value
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{self.path.name} does not hold a dictionary with names")
        return value

    def follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in TUPLES:
            number = TUPLES[name]
            stack[-number:] = [tuple(stack[-number:])]
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memory[len(self.memory) if argument is None else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memory[int(argument)])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(MARK)
        else:
            self._combine(name, argument)

    def _combine(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("TUPLE", "LIST", "DICT"):
            items = self._since_mark()
            stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else _dictionary(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            _expect(stack[-1], dict).update(_dictionary(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            wanted = argument if name == "GLOBAL" else " ".join([stack.pop(), stack.pop()][::-1])
            stack.append(self._symbol(wanted))
        elif name == "REDUCE":
            arguments, what = stack.pop(), stack.pop()
            stack.append(Made(self._callable(what), _expect(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _expect(stack[-1], Made).state = _expect(state, tuple)
        else:
            raise self._refused(f"the instruction {name}")

    def _since_mark(self) -> list[Any]:
        place = len(self.stack) - 1 - self.stack[::-1].index(MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _symbol(self, wanted: str) -> Symbol:
        if wanted not in SYMBOLS:
            raise self._refused(f"{wanted.replace(' ', '.')!r}")
        return SYMBOLS[wanted]

    def _callable(self, what: Any) -> Symbol:
        if not isinstance(what, Symbol) or what not in (RECONSTRUCT, DTYPE):
            raise self._refused(f"a call of {what if isinstance(what, Symbol) else type(what).__name__!r}")
        return what

    def _refused(self, what: str) -> UserError:
        return UserError(
            f"{self.path} is refused: its pickle asks for {what}. Only dictionaries, texts, numbers and numeric arrays "
            "are read, since a pickle that holds anything else can run any program. Do not load this file with other "
            "tools unless you trust who wrote it."
        )


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} came")
    return value


def _dictionary(items: list[Any]) -> dict[str, Any]:
    """Names and values in turn. No other keys: hashing tuples that hold one another twice, sixty deep, has no end."""
    return {_expect(key, str): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _plain(value: Any) -> Any:
    """A value of the dictionary as a caller may have it: an array, a text or a number; None for anything else."""
    if isinstance(value, Made):
        return _array(value)
    return value if isinstance(value, str | int | float | bool) and not isinstance(value, Symbol) else None


def _array(made: Made) -> np.ndarray:
    """An array from its recorded state: (version, shape, dtype, Fortran order, bytes)."""
    if made.what != RECONSTRUCT or len(made.state) != 5:
        raise ValueError("an array without content")
    _, shape, dtype, fortran, content = made.state
    kind = _number_type(dtype)
    if not isinstance(content, bytes) or not all(isinstance(n, int) and n >= 0 for n in _expect(shape, tuple)):
        raise ValueError("an array that is not numeric")
    if math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(f"an array of {shape} {kind} with {len(content)} bytes")
    return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


def _number_type(made: Any) -> np.dtype:
    """dtype('f4') with the state (version, byte order, ...)."""
    name = made.arguments[0] if isinstance(made, Made) and made.what == DTYPE and made.arguments else None
    if not isinstance(name, str) or not NUMBERS.fullmatch(name):
        raise ValueError(f"an array of {name[:80] if isinstance(name, str) else type(name).__name__}, not of numbers")
    kind = np.dtype(name)
    return kind.newbyteorder(">") if made.state[1:2] == (">",) else kind
