"""How fast this machine renders scenes, trains, samples from and evaluates recipes, reads cached features and opens
large data, and how this compares with the released manner.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.benchmarks.speed import opening
from crossflow.benchmarks.speed.comparison import SIZES, SMALL_SIZES, comparison
from crossflow.benchmarks.speed.evaluation import evaluation_speed
from crossflow.benchmarks.speed.reading import NUM_ROWS, reading_speed
from crossflow.benchmarks.speed.rendering import PROCESSES, rendering_speed
from crossflow.benchmarks.speed.rendering import SIZES as SCENE_SIZES
from crossflow.benchmarks.speed.sampling import sampling_speed
from crossflow.benchmarks.speed.training import Case, training_speed
from crossflow.engine.provenance import environment

PARTS = ("scenes", "training", "sampling", "evaluation", "cache", "opening", "released")
DEFAULT_PARTS = ("scenes", "training", "sampling", "cache")
"""Evaluation may first train a judge; opening large lists and the comparison with the released manner take minutes."""


@dataclass(frozen=True)
class Choice:
    """What is measured."""

    recipes: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    """float32, bf16, fp16; none: the recipe's own, and for the comparison float32 and bf16."""
    compiled: tuple[bool, ...] = (False,)
    batch_size: int | None = None
    """Of sampling."""
    small: bool = False
    """Sizes for tests."""
    compared: bool = False
    """Compare these recipes with the released manner, instead of the sizes that a CPU can compare."""

    @property
    def cases(self) -> list[Case]:
        """Every recipe in every precision, uncompiled and compiled."""
        return [
            Case(recipe, self.overrides, precision, compiled, self.small)
            for recipe, precision, compiled in itertools.product(
                self.recipes, self.precisions or (None,), self.compiled
            )
        ]

    @property
    def sizes(self) -> dict[str, Case]:
        """What is compared with the released manner."""
        if self.compared:
            return {recipe: Case(recipe, self.overrides, small=self.small) for recipe in self.recipes}
        return SMALL_SIZES if self.small else SIZES


def measure(
    choice: Choice,
    folder: Path,
    *,
    parts: Sequence[str] = DEFAULT_PARTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Rows of measurements by part, with the machine that they belong to.

    folder: for temporary files; progress(done, total): called after each row.
    """
    compared = choice.precisions or ("float32", "bf16")
    num_rows = {
        "scenes": len(SCENE_SIZES) * len(PROCESSES),
        "cache": NUM_ROWS,
        "opening": opening.NUM_ROWS,
        "released": len(choice.sizes) * len(compared),
    }
    counter, total = itertools.count(1), sum(num_rows.get(part, len(choice.cases)) for part in parts)

    def on_row() -> None:
        progress(next(counter), total)

    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "scenes": lambda: rendering_speed(on_row=on_row),
        "training": lambda: training_speed(choice.cases, on_row=on_row),
        "sampling": lambda: sampling_speed(choice.cases, choice.batch_size, on_row=on_row),
        "evaluation": lambda: evaluation_speed(choice.cases, on_row=on_row),
        "cache": lambda: reading_speed(folder / "reading", on_row=on_row),
        "opening": lambda: opening.opening_speed(folder / "opening", on_row=on_row),
        "released": lambda: comparison(choice.sizes, compared, on_row=on_row),
    }
    return {**{part: measures[part]() for part in PARTS if part in parts}, **environment()}
