"""What an evaluation is made of: cases (an input and the truth that its output is compared with) and the tiles that
show them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from crossflow.core.errors import UserError
from crossflow.data.dataset import Examples
from crossflow.data.item import BadItem, Item


@dataclass(frozen=True)
class Case:
    """One thing to score: the model's input, the truth that its output is compared with, and the item behind them
    (None for a prompt that belongs to no item).
    """

    id: str
    input: Any
    truth: Any
    item: Item | None = None


@dataclass(frozen=True)
class Tile:
    """A picture (H, W, 3) uint8 with a line of text under it."""

    image: np.ndarray
    text: str = ""


class OpenData(Protocol):
    """Opens a split of a run's data, or of `spec`: at most `limit` items; `options`: settings of the data format."""

    def __call__(
        self,
        split: str,
        spec: str | None = None,
        *,
        limit: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Examples: ...


class Cases(ABC):
    """Cases by number. A number may have none: its item is unreadable, or unfit for scoring; `bad` says why."""

    spec: str
    split: str
    examples: Examples | None
    """The items that the cases are made from, where there are any."""

    @property
    @abstractmethod
    def bad(self) -> dict[str, str]:
        """Item id -> reason, for the items met so far that have no case."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, numbers: Sequence[int]) -> list[tuple[int, Case]]:
        """The cases with these numbers, each with its number; numbers without a case are left out."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Of the content of the data that the cases are made from."""

    def find(self, ids: Sequence[str]) -> list[Case]:
        """The cases with these ids, in their order; ids without a case are left out."""
        cases = {case.id: case for case in self if case.id in ids}
        return [cases[id] for id in ids if id in cases]

    def __iter__(self) -> Iterator[Case]:
        """Every case; at most 16 are in memory at a time."""
        for start in range(0, len(self), 16):
            for _, case in self.at(range(start, min(start + 16, len(self)))):
                yield case

    def all(self) -> list[Case]:
        """Every case, in memory. Raises UserError when there are none."""
        cases = list(self)
        if not cases:
            reasons = "; ".join(f"{id}: {reason}" for id, reason in list(self.bad.items())[:3])
            raise UserError(f"No item of {self.spec} (split {self.split}) can be scored ({reasons or 'it is empty'}).")
        return cases


class ListedCases(Cases):
    """Cases that are held in memory, such as prompts."""

    def __init__(
        self, cases: Sequence[Case], spec: str, split: str, fingerprint: str, examples: Examples | None = None
    ) -> None:
        self.cases, self.spec, self.split, self.examples = list(cases), spec, split, examples
        self._fingerprint = fingerprint

    @property
    def bad(self) -> dict[str, str]:
        """Empty: each number has a case."""
        return {}

    def __len__(self) -> int:
        return len(self.cases)

    def at(self, numbers: Sequence[int]) -> list[tuple[int, Case]]:
        """The cases with these numbers."""
        return [(number, self.cases[number]) for number in numbers]

    def fingerprint(self) -> str:
        """Of the content of the data that the cases are made from."""
        return self._fingerprint


class ItemCases(Cases):
    """One case for each item of a data set, read when it is needed. `make` raises BadItem for an item without a
    case.
    """

    def __init__(self, examples: Examples, make: Callable[[Item], Case]) -> None:
        self.examples: Examples = examples
        self.make = make
        self.spec, self.split = examples.reader.spec, examples.reader.split
        self._numbers = {id: number for number, id in enumerate(examples.reader.ids)}
        self._unfit: dict[str, str] = {}

    @property
    def bad(self) -> dict[str, str]:
        """Item id -> reason: unreadable items, and those without a case."""
        return {**self.examples.bad, **self._unfit}

    def __len__(self) -> int:
        return len(self.examples)

    def at(self, numbers: Sequence[int]) -> list[tuple[int, Case]]:
        """The cases with these numbers, from items that are loaded together."""
        cases = []
        for item in self.examples.items_at(numbers):
            try:
                cases.append((self._numbers[item.id], self.make(item)))
            except BadItem as bad:
                self._unfit[bad.id] = bad.reason
        return cases

    def find(self, ids: Sequence[str]) -> list[Case]:
        """The cases of the items with these ids, without reading others."""
        return [case for id in ids if id in self._numbers for _, case in self.at([self._numbers[id]])]

    def fingerprint(self) -> str:
        """Of the content of the data set."""
        return self.examples.reader.fingerprint()


def is_picture(value: object) -> bool:
    """Whether `value` is an array uint8 (H, W, 3)."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3
