"""The measurements as a page in Markdown: a table for each part, and the longest operators of each row."""

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "scenes": "Rendering of scenes",
    "training": "Training steps",
    "sampling": "Sampling",
    "evaluation": "Evaluation",
    "opening": "Large data: opening, order, memory",
    "cache": "Reading of features beside one pickled file per sample",
    "released": "Beside the released manner",
}
HIDDEN = ("longest_operators",)
UNITS = {
    "operations_per_step": "TFLOP per step",
    "operations_per_batch": "TFLOP per batch",
    "ceiling_per_second": "ceiling TFLOP/s",
}
NUM_OPERATORS = 5


def page(results: Mapping[str, Any], command: str) -> str:
    """The page of what `run.measure` returned; command: by which it was measured."""
    lines = ["# Speed", "", f"`{command}`", ""]
    versions = [f"{name} {version}" for name, version in results.get("versions", {}).items()]
    machine = [str(results[name]) for name in ("machine", "gpu", "git") if results.get(name)]
    lines += ["; ".join([*machine, *versions]), ""]
    for part, title in TITLES.items():
        if results.get(part):
            lines += [f"## {title}", "", *_table(results[part]), "", *_operators(results[part])]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as a table, with the columns of all of them."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN]
    lines = [f"| {' | '.join(_heading(name) for name in columns)} |", f"|{'---|' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(_cell(name, row.get(name)) for name in columns)} |" for row in rows)]


def _heading(name: str) -> str:
    """A column's name in words, with its unit."""
    if name in UNITS:
        return UNITS[name]
    for ending, unit in (("_bytes", "GB"), ("_per_second", "per s"), ("_seconds", "s")):
        if name.endswith(ending):
            return f"{name.removesuffix(ending).replace('_', ' ')} {unit}"
    return name.replace("_", " ")


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if name in UNITS:
            return f"{value / 1e12:.4g}"
        if name.endswith("_bytes"):
            return f"{value / 1e9:.3g}"
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return str(value).replace("|", "\\|")


def _operators(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line with the longest operators of each row that was profiled."""
    lines = []
    for row in rows:
        if operators := row.get("longest_operators"):
            words = ", ".join(f"{name} {share:.0%}" for name, share in operators[:NUM_OPERATORS])
            label = " ".join(str(row[key]) for key in ("recipe", "precision") if key in row)
            lines.append(f"- {label}{', compiled' if row.get('compiled') else ''}: {words}")
    return [*lines, ""] if lines else []
