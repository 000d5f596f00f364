"""What the checks find."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: what it is and what to do, each in plain sentences.

    >>> print(Finding("disk", "The disk has 1.0 GB left.", "Free some space."))
    problem: The disk has 1.0 GB left. Free some space.
    """

    name: str
    """Of the check, such as `collapsed posterior`."""
    sentence: str
    advice: str
    severity: Literal["problem", "warning"] = "problem"
    """problem: results are wrong or lost; warning: they may be worse or later than they need to be."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.sentence} {self.advice}"
