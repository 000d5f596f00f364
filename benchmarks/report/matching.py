"""The papers' tables that an evaluation belongs to, and what makes its numbers incomparable with theirs."""

from crossflow.benchmarks.report.measured import Measured
from crossflow.benchmarks.report.paper import Metric, Paper, Protocol, Table

ABLATIONS = ("ablation-", "flowtok-")
"""Prefixes of the tables that `crossflow ablate` shows."""
SIZE_TOLERANCE = 0.1
"""Relative difference in parameters up to which two models count as equally large."""


def is_ablation(table: str) -> bool:
    """Whether the table of this name belongs to `crossflow ablate`."""
    return table.startswith(ABLATIONS)


def places(row: Measured, numbers: Paper) -> list[str]:
    """Names of the tables to show an evaluation beside: of its protocol, else of its data, else the task's main one."""
    candidates = {
        name: table
        for name, table in numbers.tables.items()
        if numbers.protocols[table.protocol].task == row.task and not is_ablation(name)
    }
    same_protocol = [name for name, table in candidates.items() if table.protocol == row.protocol]
    if same_protocol:
        return same_protocol
    on_data = [name for name, table in candidates.items() if same_data(row, numbers.protocols[table.protocol])]
    first = [name for name in on_data if candidates[name].protocol == candidates[on_data[0]].protocol]
    return first or [name for name, table in candidates.items() if table.main]


def same_data(row: Measured, protocol: Protocol) -> bool:
    """Whether the name of the evaluated data contains one of the protocol's words."""
    spec = (row.data or "").lower()
    return any(word in spec for word in protocol.words)


def score_of(row: Measured, metric: Metric) -> float | None:
    """An evaluation's score in a paper's metric, in the paper's unit; None if it was not measured."""
    known = {_plain(name): value for name, value in row.scores.items()}
    values = [known[_plain(name)] for name in metric.names if _plain(name) in known]
    return metric.factor * values[0] if values else None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def differences(row: Measured, table: Table, numbers: Paper) -> list[str]:
    """In words, how an evaluation differs from the table: data, resolution, split, items, metrics, size."""
    protocol = numbers.protocols[table.protocol]
    return [*_data_differences(row, table, protocol), *_score_differences(row, table, numbers), *_size(row, table)]


def _data_differences(row: Measured, table: Table, protocol: Protocol) -> list[str]:
    words = []
    named = row.protocol == table.protocol
    if not named and not same_data(row, protocol):
        words.append(f"data set: {row.data or 'unknown'} here, {protocol.data} in the paper")
    elif not named:
        words.append(f"data set: {row.data} is named like {protocol.data}, but no protocol has verified it")
    size = row.manifest.get("image_size")
    if protocol.resolution is not None and size != protocol.resolution:
        words.append(f"resolution: {f'{size} px' if size else 'unknown'} here, {protocol.resolution} px in the paper")
    if protocol.split is not None and row.split != protocol.split:
        words.append(f"split: {row.split or 'unknown'} here, {protocol.split} in the paper")
    if protocol.items is not None and row.num_items != protocol.items:
        items = "unknown" if row.num_items is None else row.num_items
        words.append(f"items: {items} here, {protocol.items} in the paper")
    return words


def _score_differences(row: Measured, table: Table, numbers: Paper) -> list[str]:
    words = []
    lacking = [metric for metric in table.metrics if score_of(row, numbers.metrics[metric]) is None]
    if lacking:
        words.append(f"not measured here: {', '.join(lacking)}")
    if row.protocol != table.protocol and len(lacking) < len(table.metrics):
        implementation = numbers.protocols[table.protocol].implementation
        words.append(f"metric implementation: crossflow's own here; in the paper {implementation}")
    return words


def _size(row: Measured, table: Table) -> list[str]:
    published = [other.params for other in table.rows if other.kind == "method" and other.params]
    if not published:
        return []
    flow = flow_size(row)
    if flow is not None and any(abs(flow / params - 1) < SIZE_TOLERANCE for params in published):
        return []
    return [
        f"size: {'unknown' if flow is None else size_in_words(flow)} here, {size_in_words(published[0])} in the paper"
    ]


def flow_size(row: Measured) -> float | None:
    """Parameters of the flow network in millions."""
    return row.cost.parameters["flow"] / 1e6 if row.cost.parameters and "flow" in row.cost.parameters else None


def size_in_words(millions: float | None) -> str:
    """`70M`, `1.04B`, or `-` for None."""
    return "-" if millions is None else f"{millions:.3g}M" if millions < 1000 else f"{millions / 1000:.3g}B"
