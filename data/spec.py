"""Specs: how users name data, `PREFIX:LOCATION?OPTION=VALUE&OPTION=VALUE@SPLIT`.

The prefix is a format, the location a path or name, options belong to the format (`kitti:DIR?crop=eigen&cap=none`),
and `@SPLIT` overrides the split that a command would read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from crossflow.core.errors import UserError, unknown_name
from crossflow.data.files import existing
from crossflow.data.splits import SPLITS


@dataclass(frozen=True)
class Option:
    """One option of a format. All values are text."""

    meaning: str
    default: str = ""
    choices: tuple[str, ...] = ()
    number: bool = False
    """The value is a number above 0, or `none`."""
    is_place: bool = False
    """The value is a path, which does not change what the data are."""

    def describe(self) -> str:
        """One line for help texts: the possible values, the meaning and the default."""
        kind = "|".join(self.choices) or ("number|none" if self.number else "...")
        return f"{kind}: {self.meaning}" + (f" (default {self.default})" if self.default else "")


Options = Mapping[str, Option]


def split_forced(spec: str) -> tuple[str, str]:
    """(spec without `@SPLIT`, split), the split "" when the spec names none.

    >>> split_forced("coco:/data@val"), split_forced("folder:a@b")
    (('coco:/data', 'val'), ('folder:a@b', ''))
    """
    spec = spec.strip()
    rest, at, split = spec.rpartition("@")
    is_split = at and split in SPLITS and existing(spec) is None  # a path may end in @val
    return (rest, split) if is_split else (spec, "")


def split_location(location: str) -> tuple[str, str]:
    """(path or name, options) of `LOCATION?OPTIONS`; a path that exists with its question mark has no options."""
    if existing(location) is not None:
        return location, ""
    place, _, options = location.partition("?")
    return place, options


def parse_options(text: str, options: Options, spec: str) -> dict[str, str]:
    """The value of every option: those of `text` (`a=1&b=2`), and the defaults of the others.

    Raises UserError for unknown names and invalid values.
    """
    values = {name: option.default for name, option in options.items()}
    for part in filter(None, text.split("&")):
        name, equals, value = part.partition("=")
        if name not in options:
            if not options:
                raise UserError(f"{spec!r}: no such path, and this format has no options such as {name!r} after '?'.")
            raise unknown_name(f"option (after the '?' of {spec!r})", name, options)
        if not equals or not value:
            raise UserError(f"{spec!r}: the option {name!r} has no value; write {name}={options[name].describe()}.")
        _check(name, value, options[name], spec)
        values[name] = value
    return values


def _check(name: str, value: str, option: Option, spec: str) -> None:
    if option.choices and value not in option.choices:
        raise unknown_name(f"value of {name} in {spec!r}", value, option.choices)
    if option.number and value != "none":
        try:
            valid = 0 < float(value) < float("inf")
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"{spec!r}: {name} is {value!r}; it must be a number above 0, or none.")
