"""How a task is scored: what is compared with what (cases), by which metric, beside which trivial output.

A scoring knows the configuration of a run and the rules of a protocol, not the model: it prepares inputs and truths,
and the evaluation asks the model for the outputs between them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from crossflow.core.config import Config, Section
from crossflow.core.errors import UserError
from crossflow.core.metrics import TaskMetric
from crossflow.data.dataset import Examples
from crossflow.data.item import BadItem, Item

Output: TypeAlias = Any
"""What a task makes: a picture, a depth map, a caption, ..."""


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

    def fingerprint(self) -> str:
        """Of the content of the data set."""
        return self.examples.reader.fingerprint()


class NoRules(Section):
    """Of a task about which protocols fix nothing."""


C = TypeVar("C", bound=Config)
R = TypeVar("R", bound=Section)


class Scoring(ABC, Generic[C, R]):
    """How outputs of a run are scored. A task writes at least `case`, and names its `Metric` and `headline`.

    Args:
        config: of the run.
        rules: of a protocol; None: the rules by which a run scores itself (`own_rules`).
        seed: of what is drawn for scoring (prompts, shuffled controls); never that of an evaluated run, since runs with
            other seeds must be scored on the same cases.
        networks: measuring networks by role, opened at the first look-up.
    """

    Rules: ClassVar[type[Section]] = NoRules
    """What a protocol may fix for this task: a section of settings."""
    Metric: ClassVar[type[TaskMetric]]
    headline: ClassVar[tuple[str, ...]] = ()
    """Names of the scores shown first."""
    section: ClassVar[str] = ""
    """Name of the section of a protocol that holds the rules; the task's name when empty."""
    networks_by_role: ClassVar[Mapping[str, Callable[[str, torch.device], Any]]] = {}
    """Role -> (source, device) -> measuring network with a `checksum`; `features` and `lpips` belong to every task."""

    def __init__(
        self, config: C, rules: R | None = None, *, seed: int = 0, networks: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.seed, self.networks = config, seed, networks or {}
        self.by_protocol = rules is not None
        self.rules: R = self.own_rules() if rules is None else rules

    def own_rules(self) -> R:
        """The rules of a run that is scored without a protocol."""
        return self.Rules()  # type: ignore[return-value]

    @classmethod
    def scores(cls, rules: Section) -> tuple[str, ...]:
        """Names of all scores that the metric can give under `rules`."""
        return cls.Metric.names

    # -- what is scored

    @property
    def options(self) -> Mapping[str, str]:
        """Settings of the data format that scoring needs, where a format has them and its spec does not say
        otherwise.
        """
        return {}

    @property
    def resize(self) -> str:
        """In words, what is done to pictures before the model sees them; stands in the manifest."""
        return f"centre square, antialiased bicubic to {self.config.data.image_size} px"

    @abstractmethod
    def case(self, item: Item) -> Case:
        """What is scored on an item; raises BadItem when nothing can be."""

    def cases(self, examples: Examples, limit: int) -> Cases:
        """The cases of opened data, at most `limit`."""
        return ItemCases(examples, self.case)

    def open_cases(self, open_data: OpenData, spec: str | None, split: str, limit: int) -> Cases:
        """The cases of a split of the data at `spec`; None: the run's validation data."""
        return self.cases(open_data(split, spec, limit=limit, options=self.options), limit)

    # -- how

    def metric(self, *, thorough: bool = False) -> TaskMetric:
        """A new, empty metric. thorough: with numbers that take long or need more than Python, where available."""
        return self.Metric()

    def trivial(self, open_train: Callable[[], Examples]) -> Callable[[Case], Any] | None:
        """Case -> the output of the trivial baseline, perhaps learned from the training items (epoch 0, not augmented);
        None when the metric carries its own control.
        """
        return None

    def baseline(self, open_train: Callable[[], Examples], cases: Iterable[Case]) -> dict[str, float]:
        """The scores of the trivial output on the same cases; empty without one."""
        trivial = self.trivial(open_train)
        if trivial is None:
            return {}
        metric = self.metric()
        for case in cases:
            metric.add(case.id, trivial(case), case.truth)
        return metric.compute()

    def tiles(self, case: Case, output: Output) -> list[Tile]:
        """Input, output and truth of a case, side by side; here those of them that are pictures."""
        named = (("input", case.input), ("output", output), ("truth", case.truth))
        return [Tile(value, name) for name, value in named if is_picture(value)]


def is_picture(value: object) -> bool:
    """Whether `value` is an array uint8 (H, W, 3)."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3
