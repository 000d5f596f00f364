"""What a user did wrong, said in one paragraph: what came, what was possible, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error the user can mend. The command line prints its text without a traceback and exits with status 2."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` names of a `kind`: near names first, then all of them."""
    names = sorted(known)
    prefix = name[: name.rfind(".") + 1]  # that of a setting ("train."), which would make all of them look near
    ends = {known_name.removeprefix(prefix): known_name for known_name in names}
    near = difflib.get_close_matches(name.removeprefix(prefix), ends, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(ends[match]) for match in near)}?" if near else ""
    return UserError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")
