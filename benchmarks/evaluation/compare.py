"""Evaluations read back from disk: how to repeat one, and what two of them say about the same items.

Two evaluations on the same items are compared by pairs: the interval is that of the mean difference over items, which
is much narrower than two overlapping intervals suggest when the items differ more than the models do.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.benchmarks.estimate import Estimate, student_factor
from crossflow.core.errors import UserError
from crossflow.core.settings import flat

EQUAL = 1e-9
"""Relative difference up to which repeated numbers count as equal."""
MEAN = 1e-6
"""Relative difference up to which a score is the mean of its rows."""


@dataclass(frozen=True)
class Recorded:
    """An evaluation on disk: its scores, and the manifest of how they were measured."""

    path: Path
    """The metrics.json."""
    scores: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]
    manifest: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of items.jsonl beside metrics.json; empty without the file."""
        path = self.path.with_name("items.jsonl")
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_evaluation(source: str | Path) -> Recorded:
    """The evaluation of a metrics.json, or of the folder that contains it. Raises UserError if there is none."""
    path = Path(source).expanduser()
    path = path / "metrics.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Recorded(path, content["scores"], content.get("intervals", {}), content["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not an evaluation ({error}). Give a metrics.json written by crossflow evaluate, or its folder."
        ) from error


def options_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `crossflow evaluate` that repeat this evaluation. Raises UserError for a manifest without them."""
    missing = [name for name in ("checkpoint", "weights", "data", "sample", "seed", "num") if name not in manifest]
    if missing:
        raise UserError(
            f"This manifest has no {', '.join(missing)}: it was written by a version that did not record them."
        )
    return {
        "checkpoint": manifest["checkpoint"],
        "weights": manifest["weights"],
        "seed": manifest["seed"],
        "guide_with": manifest["guided_by"],
        "adapter_scale": next(iter(manifest.get("adapters", {}).values()), None),
        "replaced": tuple(manifest.get("set", ())),
        "precision": str(manifest.get("precision", "float32")).partition(",")[0],
        "data": manifest["data"]["spec"],
        "split": manifest["data"]["split"],
        "num": manifest["num"],
    }


# -- repeating


def expect_repeated(before: Recorded, scores: Mapping[str, float], manifest: Mapping[str, Any]) -> str:
    """A sentence if the repeated scores equal those of `before`. Raises UserError with the differences otherwise."""
    changed = [name for name in before.scores if not _close(before.scores[name], scores.get(name))]
    if not changed:
        return f"The numbers are the same as in {before.path} ({len(before.scores)} compared)."
    numbers = ", ".join(f"{name} {before.scores[name]:.6g} -> {_number(scores.get(name))}" for name in changed[:6])
    causes = [line for lines in differences(before.manifest, manifest).values() for line in lines]
    why = f"The manifests differ in: {'; '.join(causes[:8])}." if causes else "The manifests do not differ."
    raise UserError(f"{len(changed)} of {len(before.scores)} numbers differ from {before.path}: {numbers}. {why}")


def _close(a: float, b: float | None, tolerance: float = EQUAL) -> bool:
    return b is not None and (a == b or abs(a - b) <= tolerance * max(1.0, abs(a)))


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"


# -- two manifests

MEASUREMENT = "measured differently, so the numbers cannot be compared"
MODEL = "another model, or other sampling"
CIRCUMSTANCES = "should not matter"
GROUPS = {
    MEASUREMENT: (
        "task", "protocol", "data.fingerprint", "data.split", "ids.sha256", "num", "num_items", "networks",
        "real_statistics", "bad_items",
    ),
    MODEL: (
        "checksums", "weights", "guided_by", "image_size", "resize", "sample", "evaluations", "seed", "precision",
        "tf32", "set",
    ),
}  # fmt: skip
"""Entries of a manifest by what a difference in them means for the numbers; all others should not matter."""
IGNORED = (
    "started", "seconds", "ids.first", "data.spec", "protocol.networks", "protocol.notes", "protocol.title",
    "protocol.layout", "protocol.headline",
)  # fmt: skip
"""Entries that say nothing about the numbers, or nothing that a checksum does not say better."""


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str]]:
    """The entries in which two manifests differ, by what that means for their numbers, as `name: value -> value`."""
    before, after = flat(a), flat(b)
    groups: dict[str, list[str]] = {name: [] for name in (*GROUPS, CIRCUMSTANCES)}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name) or _belongs(name, IGNORED):
            continue
        group = next((group for group, names in GROUPS.items() if _belongs(name, names)), CIRCUMSTANCES)
        groups[group].append(f"{name}: {_entry(before, name)} -> {_entry(after, name)}")
    return {group: lines for group, lines in groups.items() if lines}


def _belongs(name: str, entries: Sequence[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in entries)


def _entry(values: Mapping[str, Any], name: str) -> str:
    text = json.dumps(values[name], ensure_ascii=False) if name in values else "missing"
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- two sets of scores


def compare_scores(a: Recorded, b: Recorded) -> list[tuple[str, float, float, str]]:
    """(name, score of a, score of b, verdict in words) for every number that both have."""
    rows_a, rows_b = a.rows(), b.rows()
    table = []
    for name, value in a.scores.items():
        if name not in b.scores:
            continue
        if _close(value, b.scores[name]):
            verdict = "equal"
        else:
            groups = _groups(rows_a, name, value), _groups(rows_b, name, b.scores[name])
            verdict = _paired(*groups) or _unpaired(a, b, name)
        table.append((name, value, b.scores[name], verdict))
    return table


Groups = Mapping[str, Mapping[str, float]]
"""Values by item id, in one group or in several of equal weight (as "overall", the mean of the kinds of prompts)."""


def _groups(rows: Iterable[Mapping[str, Any]], name: str, score: float) -> Groups:
    """The values behind a score; empty for a number that is not a mean over items, such as the BLEU of a corpus."""
    column: dict[str, float] = {}
    kinds: dict[str, dict[str, float]] = {}
    for row in rows:
        kind = row.get("kind", row.get("tag"))
        if isinstance(row.get(name), int | float):
            column[row["id"]] = float(row[name])
        elif isinstance(kind, str) and "correct" in row:
            kinds.setdefault(kind, {})[row["id"]] = float(row["correct"])
    if column:
        groups = {name: column}
    else:
        groups = {name: kinds[name]} if name in kinds else kinds
    means = [statistics.fmean(values.values()) for values in groups.values()]
    return groups if means and _close(statistics.fmean(means), score, MEAN) else {}


def paired_difference(a: Groups, b: Groups) -> Estimate | None:
    """b - a over the items of both, with Student's interval; None unless every group has two items in common."""
    differences = [[b[group][id] - a[group][id] for id in a[group] if id in b.get(group, {})] for group in a]
    if a.keys() != b.keys() or not differences or min(map(len, differences)) < 2:
        return None
    mean = statistics.fmean(statistics.fmean(values) for values in differences)
    variance = sum(statistics.variance(values) / len(values) for values in differences) / len(differences) ** 2
    degrees = sum(len(values) - 1 for values in differences)
    return Estimate(mean, student_factor(degrees) * math.sqrt(variance))


def _paired(a: Groups, b: Groups) -> str:
    estimate = paired_difference(a, b)
    if estimate is None:
        return ""
    pairs = sum(len(a[group].keys() & b[group].keys()) for group in a)
    verdict = (
        f"second {'higher' if estimate.mean > 0 else 'lower'}" if estimate.excludes_zero else "not distinguishable"
    )
    return f"{verdict}: {estimate.mean:+.3g} ± {estimate.half:.2g} over {pairs} pairs"


def _unpaired(a: Recorded, b: Recorded, name: str) -> str:
    """What the separate intervals say, for scores without pairs of rows."""
    if name not in a.intervals or name not in b.intervals:
        return ""
    (low, high), (other_low, other_high) = a.intervals[name], b.intervals[name]
    return f"intervals {'overlap' if low <= other_high and other_low <= high else 'apart'} (no pairs of rows)"
