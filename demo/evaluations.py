"""Evaluations on disk, as a browser of their items needs them: their list, rows by a score, pictures of rows."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.benchmarks.evaluation.compare import Recorded, options_of, read_evaluation
from crossflow.benchmarks.evaluation.evaluate import Evaluation
from crossflow.benchmarks.evaluation.protocol import protocol_of
from crossflow.benchmarks.report.paper import paper
from crossflow.core.errors import UserError
from crossflow.core.progress import Progress
from crossflow.data.cases import Tile
from crossflow.demo.models import Model, Models

logger = logging.getLogger(__name__)
MAX_DEPTH = 5
"""Folders below --runs in which evaluations are looked for."""
LOWER = frozenset({"sq_rel", "rmse", "rmse_log", "log10", "silog", "lpips", "mae", "mse"})
"""Scores of which less is better, beside those that the papers' tables mark so."""
ORDERS = ("worst first", "best first")


@dataclass(frozen=True)
class Query:
    """Which items are shown: by `score`, in an order, its value between low and high."""

    score: str
    order: str = ORDERS[0]
    low: float = -math.inf
    high: float = math.inf
    num: int = 12


@functools.cache
def lower_is_better(score: str) -> bool:
    """Whether less of a score is better."""
    metrics = paper().metrics.values()
    return score in LOWER or any(metric.better == "lower" and score in metric.names for metric in metrics)


def list_evaluations(folder: Path | None, models: Models) -> dict[str, Path]:
    """metrics.json by a name without the server's folders: those below `folder`, and those of the loaded models."""
    listed: dict[str, Path] = {}
    if folder is not None:
        for depth in range(MAX_DEPTH):
            for path in sorted(folder.glob(f"{'*/' * depth}metrics.json")):
                listed[path.parent.relative_to(folder).as_posix()] = path
    known = {path.resolve() for path in listed.values()}
    for model in models.all:
        places = model.pipe.folder.glob("evaluation/*/metrics.json") if model.pipe.folder is not None else ()
        for path in sorted(places):
            if path.resolve() not in known:
                listed[f"{model.name}: {path.parent.name}"] = path
    return {name: path for name, path in listed.items() if (path.parent / "items.jsonl").is_file()}


def read(path: Path) -> tuple[Recorded, list[dict[str, Any]]]:
    """An evaluation with its rows; read again when its file has changed."""
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, _changed: int) -> tuple[Recorded, list[dict[str, Any]]]:
    recorded = read_evaluation(path)
    return recorded, recorded.rows()


def scores_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the numbers that the rows have."""
    names = (name for row in rows for name, value in row.items() if _is_number(value))
    return list(dict.fromkeys(names))


def chosen(rows: Sequence[Mapping[str, Any]], query: Query) -> list[Mapping[str, Any]]:
    """The first rows of a query; rows without the score are left out.

    >>> rows = [{"id": "a", "psnr": 20.0}, {"id": "b", "psnr": 30.0}, {"id": "c"}]
    >>> [row["id"] for row in chosen(rows, Query("psnr"))], [row["id"] for row in chosen(rows, Query("psnr", low=25))]
    (['a', 'b'], ['b'])
    """
    kept = [row for row in rows if _is_number(row.get(query.score)) and query.low <= row[query.score] <= query.high]
    ascending = lower_is_better(query.score) == (query.order == ORDERS[1])
    return sorted(kept, key=lambda row: row[query.score], reverse=not ascending)[: query.num]


def draw(path: Path, models: Models, ids: Sequence[str], on_step: Progress | None) -> list[list[Tile]]:
    """The tiles (input, output, truth) of items by id, made again by the evaluated model.

    Raises UserError where that model is not loaded, or its data cannot be opened.
    """
    recorded, _ = read(path)
    model = _evaluated(path, recorded, models)
    try:
        options_of(recorded.manifest)  # raises for a manifest that lacks something
        content, data = recorded.manifest.get("protocol"), recorded.manifest["data"]
        evaluation = Evaluation.open(
            model.pipe, protocol=protocol_of(content) if content else None, spec=data["spec"], split=data["split"],
            num=recorded.manifest["num"], seed=recorded.manifest["seed"], settings=recorded.manifest["sample"],
        )  # fmt: skip
        cases = evaluation.plan.cases.find(ids)
    except UserError as error:
        logger.warning("items of %s cannot be drawn: %s", path, error)
        raise UserError("The data of this evaluation cannot be opened here; the server's log says why.") from error
    tiles = []
    for case in cases:
        outputs = model.pipe.outputs([case.input], [case.id], evaluation.seed, evaluation.sampling, on_step)
        tiles.append(evaluation.plan.scoring.tiles(case, outputs[0]))
    return tiles


def _evaluated(path: Path, recorded: Recorded, models: Models) -> Model:
    """The loaded model of an evaluation: that of the recorded folder, or of the run that the evaluation lies in."""
    places = [Path(str(recorded.manifest.get("checkpoint"))), path.parent.parent.parent]
    for place in places:
        if (model := models.of_folder(place)) is not None and model.task == recorded.manifest.get("task"):
            return model
    raise UserError("The evaluated model is not loaded. Name its run by --checkpoint when the page is started.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
