"""A mean with its 95 % interval by Student's t: of one variant over seeds, or of paired differences over items."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval; `half` is None for a single value, which has no interval.

    >>> print(Estimate.of([1.0, 2.0, 3.0]))
    2 ± 2.5
    """

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """mean ± t(0.975, n - 1) s / sqrt(n) of n >= 1 independent values with sample deviation s."""
        mean, degrees = statistics.fmean(values), len(values) - 1
        if not degrees:
            return cls(mean, None)
        return cls(mean, student_factor(degrees) * statistics.stdev(values) / math.sqrt(len(values)))

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero; False without an interval."""
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.half is None else f"{self.mean:.4g} ± {self.half:.2g}"


def student_factor(degrees: int, level: float = LEVEL) -> float:
    """The two-sided quantile of Student's t: 2.131 for 15 degrees of freedom, 1.960 in the limit."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, degrees))
