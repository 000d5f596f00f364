"""Tables of names that users type."""

from collections.abc import Callable
from typing import Generic, TypeVar

from crossflow.core.errors import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """A table name -> entry of one `kind` ("solver", "task"); the error for an unknown name lists the known ones.

    >>> shapes = Registry[int]("shape")
    >>> shapes.register("triangle")(3)
    3
    >>> shapes.get("triangle"), shapes.names()
    (3, ['triangle'])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a class or function under `name`."""

        def enter(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry called `name`; raises UserError with similar names if there is none."""
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """All names in alphabetical order."""
        return sorted(self._entries)
