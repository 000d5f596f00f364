"""Specs: how a user names data, `PREFIX:LOCATION?SETTING=VALUE&...@SPLIT`.

The location is a path or name, settings belong to the format, and `@SPLIT` overrides the split that is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from crossflow.core.errors import UserError, unknown_name
from crossflow.data.files import existing


@dataclass(frozen=True)
class Option:
    """One setting. All values are text; `number`: a number above 0, or `none`."""

    meaning: str
    default: str = ""
    choices: tuple[str, ...] = ()
    number: bool = False
    is_place: bool = False
    """Says where something lies, which is no part of what the data are."""

    def describe(self) -> str:
        kind = "|".join(self.choices) or ("number|none" if self.number else "...")
        return f"{kind}: {self.meaning}" + (f" (default {self.default})" if self.default else "")


Options = Mapping[str, Option]


def parse_options(text: str, options: Options, spec: str) -> dict[str, str]:
    """The value of every option: those of `text` (`a=1&b=2`), and the defaults of the others.

    Raises UserError for unknown names, values that are none of the choices, and text in another form.
    """
    values = {name: option.default for name, option in options.items()}
    for part in filter(None, text.split("&")):
        name, equals, value = part.partition("=")
        if name not in options:
            if not options:
                raise UserError(
                    f"{spec!r}: there is no such place, and {name!r} behind the '?' is no setting it takes."
                )
            raise unknown_name(f"setting (behind the '?' of {spec!r})", name, options)
        if not equals or not value:
            raise UserError(f"{spec!r}: the setting {name!r} has no value; write {name}={options[name].describe()}.")
        _check(name, value, options[name], spec)
        values[name] = value
    return values


def _check(name: str, value: str, option: Option, spec: str) -> None:
    if option.choices and value not in option.choices:
        raise unknown_name(f"value of {name} in {spec!r}", value, option.choices)
    if option.number and value != "none":
        try:
            good = 0 < float(value) < float("inf")
        except ValueError:
            good = False
        if not good:
            raise UserError(f"{spec!r}: {name} is {value!r}; it must be a number above 0, or none.")


def split_location(location: str) -> tuple[str, str]:
    """(place, settings) of `PLACE?SETTINGS`; a path that exists with its question mark is a place."""
    if existing(location) is not None:
        return location, ""
    place, _, settings = location.partition("?")
    return place, settings
