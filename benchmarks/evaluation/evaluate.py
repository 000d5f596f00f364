"""One run on one split, by a protocol or by the task's own rules -> metrics.json with its manifest, one row per item,
and a page of pictures.

Items are worked off in batches that the processes share. What is finished lies on disk at once, so a killed evaluation
goes on where it was; rows, features and a few pictures are all that is kept of an item.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossflow.benchmarks.evaluation import distances as distribution
from crossflow.benchmarks.evaluation import manifest
from crossflow.benchmarks.evaluation.ledger import Ledger, Part
from crossflow.benchmarks.evaluation.networks import Networks
from crossflow.benchmarks.evaluation.page import write_page
from crossflow.benchmarks.evaluation.plan import Plan, plan
from crossflow.benchmarks.evaluation.protocol import Protocol
from crossflow.core import distributed
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.metrics import TaskMetric
from crossflow.core.output import claim, output_files, record
from crossflow.core.progress import Progress
from crossflow.data.dataset import Examples
from crossflow.engine.sample import Pipeline
from crossflow.engine.score import Scores, batches, seen_in_training
from crossflow.tasks.scoring import Case, Cases

UNFINISHED = ".unfinished"
"""Subfolder of the results that holds what is finished of an interrupted evaluation."""
NUM_TILES = 24
USUAL_NUM = 1000
EVERY = 10**9
Trivial = Callable[[Case], Any]
MEMORY = 2**28  # bytes of decoded items that an evaluation keeps for a second look


@dataclass(frozen=True)
class Report:
    folder: Path
    scores: Scores
    baseline: dict[str, float]
    manifest: dict[str, Any]


def evaluate(
    pipe: Pipeline,
    *,
    spec: str | None = None,
    split: str | None = None,
    num: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    default: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    protocol: Protocol | None = None,
    statistics: Path | None = None,
    moved: Sequence[str] = (),
) -> Report | None:
    """Scores `pipe` on at most `num` items of a split; spec: the data of the run's own validation when None.

    Several processes share the items; the first one writes and gets the report, the others get None.

    Args:
        split, num: as the protocol says when None, else `test` and 1,000.
        settings: fields of SampleConfig.
        folder: an empty or new folder to write to, or one where this evaluation was interrupted.
        default: without `folder`, where to write, numbered if taken: RUN/evaluation/DATA-SPLIT-SOLVER and all that
            differs from the recipe when None.
        overwrite: replace earlier results in the folder.
        protocol: what is scored and how; None: the task's own rules.
        statistics: a file of `distribution.Statistics` of the real pictures, instead of computing them.
        moved: settings of the run that were replaced when it was loaded, for the manifest.

    Writes metrics.json (scores, intervals, trivial baseline, manifest), items.jsonl and index.html. Raises UserError
    when the data do not fit the task or the protocol.
    """
    chosen, begun = pipe.sample_settings(**(settings or {})), time.time()
    if num is None:
        num = USUAL_NUM if protocol is None else protocol.choose or EVERY
    split = split or ("test" if protocol is None else protocol.split)
    networks = Networks({} if protocol is None else protocol.networks, pipe.device, pipe.task.Scoring.networks_by_role)
    work = plan(pipe, protocol, spec, split, num, networks)
    if work.cases.examples is not None:
        work.cases.examples.cache_bytes = MEMORY
    real = _real(pipe, work, protocol, networks, statistics, spec, split, progress)
    about = manifest.identity(pipe, work, protocol, chosen, seed=seed, num=num)
    named = (pipe.folder or Path("outputs")) / "evaluation" / _label(pipe, work.cases, chosen, seed, protocol)
    target = _claim(default or named, folder, overwrite, about)
    before = output_files(target)
    metric = work.scoring.metric(thorough=True)
    trivial, apology = _trivial(pipe, work)
    ledger = _run(
        pipe, work, metric, trivial, networks, about, chosen, seed, target, progress, with_features=real is not None
    )
    if ledger is None:
        return None
    report = _finish(pipe, work, metric, ledger, protocol, real, networks, about, begun, target, moved, apology)
    ledger.remove()
    record(target, output_files(target) - before)
    return report


def _claim(default: Path, folder: Path | None, overwrite: bool, about: Mapping[str, Any]) -> Path:
    """The folder of this evaluation in every process: where it was interrupted, else one without results."""

    def interrupted(place: Path) -> bool:
        return not (place / "metrics.json").exists() and Ledger.holds(place / UNFINISHED, _same(about))

    return distributed.on_main(lambda: claim(default, folder, overwrite=overwrite, resumable=interrupted))


def _same(about: Mapping[str, Any]) -> dict[str, Any]:
    """What an interrupted evaluation must agree in to be continued; batches change nothing but the last bits."""
    return {**about, "sample": {**about["sample"], "batch_size": None}}


def _real(
    pipe: Pipeline, work: Plan, protocol: Protocol | None, networks: Networks, given: Path | None, spec: str | None,
    split: str, progress: Progress | None,
) -> distribution.Statistics | None:  # fmt: skip
    """Statistics of the real pictures; None for a protocol without distances."""
    if protocol is None or protocol.distribution is None:
        if given is not None:
            raise UserError("Statistics of real pictures are for protocols with a distance, such as coco-fid30k.")
        return None
    if given is not None:
        found = distribution.read_statistics(given)
        if found.about.get("weights") != networks.features.checksum:
            raise UserError(
                f"The statistics in {given} were made by {found.about.get('network')}, not by the same weights of "
                f"{networks.features.words}."
            )
        return found
    assert work.cases.examples is not None
    examples = work.cases.examples
    if protocol.distribution.reference == "split" and protocol.choose is not None:
        examples = pipe.dataset(split, examples.reader.spec, options=protocol.reader)
        examples.cache_bytes = 0
    return distribution.reference(protocol, examples, networks.features, progress)


def _run(
    pipe: Pipeline, work: Plan, metric: TaskMetric, trivial: Trivial | None, networks: Networks,
    about: Mapping[str, Any], chosen: SampleConfig, seed: int, target: Path, progress: Progress | None, *,
    with_features: bool,
) -> Ledger | None:  # fmt: skip
    """Works off what is not finished; the first process gets the ledger, the others None."""
    ledger = Ledger(target / UNFINISHED, _same(about)) if distributed.is_main() else None
    finished = distributed.on_main(lambda: ledger.finished() if ledger is not None else set())
    todo = [number for number in range(len(work.cases)) if number not in finished]

    def one(part: Sequence[int]) -> Part:
        return _part(pipe, work, metric, trivial, networks, part, chosen, seed, with_features)

    done = len(finished)
    for part, result in distributed.shared(list(batches(todo, chosen.batch_size)), one):
        assert ledger is not None
        ledger.add(result)
        done += len(part)
        if progress is not None:
            progress(done, len(work.cases))
    return ledger


def _part(
    pipe: Pipeline, work: Plan, metric: TaskMetric, trivial: Trivial | None, networks: Networks,
    numbers: Sequence[int], chosen: SampleConfig, seed: int, with_features: bool,
) -> Part:  # fmt: skip
    """The cases with these numbers, drawn and scored."""
    before = dict(work.cases.bad)
    cases = work.cases.at(numbers)
    part = Part(list(numbers), {}, bad={id: why for id, why in work.cases.bad.items() if id not in before})
    if not cases:
        return part
    outputs = pipe.outputs([case.input for _, case in cases], [case.id for _, case in cases], seed, chosen)
    plain = work.scoring.metric()
    for (number, case), output in zip(cases, outputs, strict=True):
        part.rows[number] = metric.add(case.id, output, case.truth)
        if trivial is not None:
            part.trivial[number] = plain.add(case.id, trivial(case), case.truth)
        if number < NUM_TILES:
            part.pages[number] = work.scoring.tiles(case, output)
    if with_features:
        part.arrays = networks.features(outputs)
    return part


def _finish(
    pipe: Pipeline, work: Plan, metric: TaskMetric, ledger: Ledger, protocol: Protocol | None,
    real: distribution.Statistics | None, networks: Networks, about: Mapping[str, Any], begun: float, target: Path,
    moved: Sequence[str], apology: Sequence[str],
) -> Report:  # fmt: skip
    rows, trivial, pages, bad = _gathered(ledger)
    metric.replace(rows)
    values = metric.compute()
    notes = list(metric.notes)
    if real is not None and protocol is not None and protocol.distribution is not None:
        arrays = (part.arrays for part in ledger.parts() if part.arrays)
        rules, network = protocol.distribution, networks.features
        found, said = distribution.distances(rules.numbers, arrays, real, network.is_inception)
        values, notes = {**found, **values}, notes + said
        if not network.is_inception:
            notes.append(f"distances are by {network.words}: they are not FID, KID or IS and compare only among them")
    notes += [*_partial(protocol, len(rows), work), *apology]
    scores = Scores(values, metric.intervals(), metric.rows, pages, notes)
    baseline = _baseline(work, trivial)
    full = manifest.complete(
        about, ids=[row["id"] for row in rows], bad={**work.cases.bad, **bad}, networks=networks.checksums, begun=begun,
        seconds=time.time() - begun, processes=distributed.world_size(),
        real=None if real is None else {"count": real.count, **real.about}, device=pipe.device, moved=moved,
    )  # fmt: skip
    _write(target, scores, baseline, full, f"{pipe.task.name} on {work.cases.spec} ({work.cases.split})")
    return Report(target, scores, baseline, full)


def _gathered(ledger: Ledger) -> tuple[list[Any], list[Any], list[Any], dict[str, str]]:
    """Rows, rows of the trivial output and pictures in the order of the cases, and the bad items."""
    rows: dict[int, Any] = {}
    trivial: dict[int, Any] = {}
    pages: dict[int, Any] = {}
    bad: dict[str, str] = {}
    for part in ledger.parts():
        rows |= part.rows
        trivial |= part.trivial
        pages |= part.pages
        bad |= part.bad
    return *([found[number] for number in sorted(found)] for found in (rows, trivial, pages)), bad  # type: ignore[return-value]


def _partial(protocol: Protocol | None, scored: int, work: Plan) -> list[str]:
    if protocol is None or protocol.num_items in (None, scored):
        return []
    return [
        f"partial: {scored} items were scored and {protocol.name} has {protocol.num_items}, so this is not its number"
    ]


def _trivial(pipe: Pipeline, work: Plan) -> tuple[Trivial | None, list[str]]:
    """The trivial output of a case, and notes: on items that the run trained on, or why there is no trivial output."""
    notes: list[str] = []

    def open_train() -> Examples:
        train = pipe.dataset("train")
        if work.cases.examples is not None:
            notes.extend(seen_in_training(train, work.cases.examples))
        return train

    try:
        return work.scoring.trivial(open_train), notes
    except UserError as error:  # a run is complete without its training data, and is scored without them
        return None, [f"no trivial baseline, which is made from the training data: {error}"]


def _baseline(work: Plan, rows: Sequence[Any]) -> dict[str, float]:
    if not rows:
        return {}
    metric = work.scoring.metric()
    metric.replace(rows)
    return metric.compute()


def _write(target: Path, scores: Scores, baseline: Mapping[str, float], full: Mapping[str, Any], title: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    content = {
        "scores": scores.values,
        "intervals": scores.intervals,
        "baseline": baseline,
        "notes": scores.notes,
        "manifest": full,
    }
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows)
    write_atomically(target / "items.jsonl", "".join(lines))
    write_page(target, title, content, scores.pages)
    write_atomically(target / "metrics.json", json.dumps(content, indent=1, ensure_ascii=False))


def _label(pipe: Pipeline, cases: Cases, chosen: SampleConfig, seed: int, protocol: Protocol | None) -> str:
    """The name of an evaluation's folder, so that one with other settings does not take the place of this one."""
    place = cases.spec.partition("?")[0].rstrip("/").rpartition("/")[2].replace(":", "-")
    place = place if protocol is None else f"{protocol.name}-{place}"
    usual = {"solver": chosen.solver, "steps": chosen.steps, "batch_size": chosen.batch_size}
    recipe = {**pipe.settings.model_dump(mode="json"), **usual}
    other = {name: value for name, value in chosen.model_dump(mode="json").items() if value != recipe[name]}
    other |= {"seed": seed} if seed else {}
    words = [f"{name}{value}".replace(" ", "") for name, value in other.items()]
    words += [pipe.weights] * (pipe.weights != "ema") + ["autoguided"] * (pipe.weak is not None)
    return "-".join([place, cases.split, f"{chosen.solver}{chosen.steps}", *words])
