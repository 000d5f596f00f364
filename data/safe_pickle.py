"""Pickled dictionaries of arrays in .npy files, read without executing them.

A pickle is a program. It is not run: the few instructions that build plain values and numeric arrays are followed one
by one, and any other instruction is refused.
"""

import math
import pickletools
import re
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from crossflow.core.errors import PARSING_ERRORS, UserError

LARGEST_FILE = 2**28  # bytes; the released files have 1.7 MB
T = TypeVar("T")

NUMBERS = re.compile(r"[<>|=]?([fiub])(1|2|4|8)")


def read_npy(path: Path) -> Any:
    """The array of a .npy file, or its pickled dictionary of plain values and numeric arrays.

    Raises UserError when the pickle contains anything else, ValueError when the file is damaged.
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
            raise ValueError(f"{path.name} is not a .npy file: {error}") from error
        if dtype.hasobject:
            if shape != ():
                raise ValueError(f"{path.name} holds {shape} objects, not one dictionary")
            return read_pickled(file, path)
        if math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{path.name} is truncated: it should hold {shape} {dtype}")
    return np.load(path, allow_pickle=False)


class Symbol(str):
    """A name that a pickle refers to, `module name`; nothing is imported."""


class Call:
    """A call of `function` in a pickle, recorded instead of executed, and the state set on its result."""

    def __init__(self, function: Symbol, arguments: tuple) -> None:
        self.function, self.arguments = function, arguments
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
    """The dictionary pickled at the current position of `file`: names -> arrays, texts and numbers; None for the rest.

    Raises UserError, which names any other content, and ValueError when the pickle is damaged.
    """
    machine = _Machine(path)
    try:
        for opcode, argument, _ in pickletools.genops(file.read()):  # which allocates no claimed lengths
            if opcode.name == "STOP":
                return {key: _plain(value) for key, value in machine.top_dictionary().items()}
            machine.follow(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged: {type(error).__name__} {error}") from error
    raise ValueError(f"{path.name} is damaged: it has no end")


class _Machine:
    """The stack and the memory of a pickle's instructions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def top_dictionary(self) -> dict[str, Any]:
        """The dictionary that the pickle leaves on the stack."""
        value = self.stack.pop()
        if isinstance(value, Call):  # np.save wraps the dictionary in an array of one object
            value = value.state[4][0] if value.function == RECONSTRUCT else value
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{self.path.name} does not hold a dictionary with names")
        return value

    def follow(self, name: str, argument: object) -> None:
        """Executes one instruction that builds plain values; UserError for any other."""
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
            self.memory[len(self.memory) if argument is None else int(str(argument))] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memory[int(str(argument))])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(MARK)
        else:
            self._combine(name, argument)

    def _combine(self, name: str, argument: object) -> None:
        """The instructions that combine values on the stack."""
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
            symbol = str(argument) if name == "GLOBAL" else " ".join([stack.pop(), stack.pop()][::-1])
            stack.append(self._symbol(symbol))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(Call(self._callable(function), _expect(arguments, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _expect(stack[-1], Call).state = _expect(state, tuple)
        else:
            raise self._refused(f"the instruction {name}")

    def _since_mark(self) -> list[Any]:
        place = len(self.stack) - 1 - self.stack[::-1].index(MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _symbol(self, name: str) -> Symbol:
        if name not in SYMBOLS:
            raise self._refused(f"{name.replace(' ', '.')!r}")
        return SYMBOLS[name]

    def _callable(self, function: object) -> Symbol:
        if not isinstance(function, Symbol) or function not in (RECONSTRUCT, DTYPE):
            raise self._refused(f"a call of {function if isinstance(function, Symbol) else type(function).__name__!r}")
        return function

    def _refused(self, content: str) -> UserError:
        return UserError(
            f"{self.path} is refused: its pickle asks for {content}. Only dictionaries, texts, numbers and numeric "
            "arrays are read, since a pickle with any other content can run arbitrary code. Do not load this file with "
            "other tools unless you trust its author."
        )


def _expect(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _dictionary(items: list[Any]) -> dict[str, Any]:
    """A dictionary of alternating names and values.

    Other keys are refused: hashing tuples that contain each other twice, sixty levels deep, never ends.
    """
    return {_expect(key, str): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _plain(value: object) -> np.ndarray | str | int | float | None:
    """A value of the dictionary for callers: an array, a text or a number; None for anything else."""
    if isinstance(value, Call):
        return _array(value)
    return value if isinstance(value, str | int | float | bool) and not isinstance(value, Symbol) else None


def _array(call: Call) -> np.ndarray:
    """An array from its recorded state: (version, shape, dtype, Fortran order, bytes)."""
    if call.function != RECONSTRUCT or len(call.state) != 5:
        raise ValueError("an array without content")
    _, shape, dtype, fortran, content = call.state
    kind = _number_type(dtype)
    if not isinstance(content, bytes) or not all(isinstance(n, int) and n >= 0 for n in _expect(shape, tuple)):
        raise ValueError("an array that is not numeric")
    if math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(f"an array of {shape} {kind} with {len(content)} bytes")
    return np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")


def _number_type(call: object) -> np.dtype:
    """dtype('f4') with the state (version, byte order, ...)."""
    if not isinstance(call, Call) or call.function != DTYPE or not call.arguments:
        raise ValueError(f"an array of {type(call).__name__}, not of numbers")
    name = call.arguments[0]
    if not isinstance(name, str) or not NUMBERS.fullmatch(name):
        raise ValueError(f"an array of {name[:80] if isinstance(name, str) else type(name).__name__}, not of numbers")
    kind = np.dtype(name)
    return kind.newbyteorder(">") if call.state[1:2] == (">",) else kind
