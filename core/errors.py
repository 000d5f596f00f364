"""Errors that a user can correct: one paragraph with the value received, the valid values, and advice."""

import difflib
import struct
import zlib
from collections.abc import Iterable

# Raised by third-party parsers (Pillow, numpy, scipy, torch, json) for the content of a damaged file.
PARSING_ERRORS = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, SyntaxError, EOFError,
    struct.error, zlib.error,
)  # fmt: skip


class UserError(Exception):
    """An error that the user can correct. The command line prints its text without a traceback and exits with status 2.

    It is not a ValueError, so code that handles the bad values of one item does not catch it.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` names of a `kind`: it suggests similar names and lists all.

    >>> print(unknown_name("solver", "euller", ["euler", "heun"]))
    Unknown solver 'euller'. Did you mean 'euler'? Known: euler, heun.
    """
    names = sorted(known)
    prefix = name[
        : name.rfind(".") + 1
    ]  # the section of a setting ("train."), which would make all its settings similar
    ends = {known_name.removeprefix(prefix): known_name for known_name in names}
    near = difflib.get_close_matches(name.removeprefix(prefix), ends, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(ends[match]) for match in near)}?" if near else ""
    return UserError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")
