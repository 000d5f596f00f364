"""One run on one split, by a protocol or by its task's own rules: metrics.json with its manifest, one row per item, and
a page of pictures.

Items are scored in batches, which several processes share. Each finished batch is on disk at once, so that a killed
evaluation continues; of an item only its row, its features and perhaps a picture are kept.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossflow.benchmarks.evaluation import manifest
from crossflow.benchmarks.evaluation.distances import distances
from crossflow.benchmarks.evaluation.ledger import Finished, Ledger, Part, Row
from crossflow.benchmarks.evaluation.networks import MeasuringNetworks
from crossflow.benchmarks.evaluation.page import write_page
from crossflow.benchmarks.evaluation.plan import Plan, plan
from crossflow.benchmarks.evaluation.protocol import Protocol
from crossflow.benchmarks.evaluation.real_pictures import prepare, reference
from crossflow.benchmarks.evaluation.statistics import Statistics, read_statistics
from crossflow.core import distributed
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.files import remove_temporaries, write_atomically
from crossflow.core.lock import FolderLock
from crossflow.core.metrics import TaskMetric
from crossflow.core.output import claim, output_files, record
from crossflow.core.progress import Progress
from crossflow.data.cases import Case
from crossflow.data.dataset import Examples
from crossflow.engine.sample import Pipeline
from crossflow.engine.score import Scores, batches, overlap_with_training
from crossflow.networks.hub import shipped_models

NUM_TILES = 24
"""Items shown on the page."""
DEFAULT_NUM = 1000
"""Maximum number of items scored without a protocol."""
ALL = 10**9
MEMORY = 2**28
"""Bytes of decoded items kept in the cache of the data set."""
UNFINISHED = ".unfinished"
"""Subfolder of the results with the finished batches of an interrupted evaluation."""
RESULTS = {"metrics.json", "items.jsonl", "index.html", "pictures.png"}
Trivial = Callable[[Case], Any]
"""The output that needs no model, such as a bicubic enlargement."""


@dataclass(frozen=True)
class Report:
    """A finished evaluation and the folder with its files."""

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
    """Scores `pipe` on a split and writes metrics.json, items.jsonl, index.html and pictures.png.

    Several processes share the items: each must call this; the first one writes and gets the report, the others None.
    Usage::

        report = evaluate(crossflow.load("runs/sr"), protocol=load_protocol("set5-x4"), spec="folder:Set5@all")
        print(report.scores.values["psnr_y"], report.baseline["psnr_y"])

    Args:
        spec: the data; None: those of the run's own validation, or those embedded for the protocol.
        split, num: None: those of the protocol, or `test` and at most 1,000 items without one.
        seed: of the noise, which depends on it and the item's id alone.
        settings: fields of SampleConfig that replace the run's own.
        folder: an empty or new folder to write to, or one in which this evaluation was interrupted.
        default: without `folder`, where to write, numbered if taken; None: `Evaluation.default_folder`.
        overwrite: replace earlier results in the folder.
        protocol: what is scored and how; None: the task's own rules.
        statistics: file of statistics of the real pictures, for a protocol with a distance.
        moved: settings of the run that were replaced when it was loaded, for the manifest.

    Raises:
        UserError: the data do not fit the task or the protocol, a measuring network is unavailable, or the folder
            contains something else.
    """
    evaluation = Evaluation.open(
        pipe, protocol=protocol, spec=spec, split=split, num=num, seed=seed, settings=settings, moved=moved
    )
    real = evaluation.real_pictures(statistics, progress)
    target = evaluation.claim(folder, default=default, overwrite=overwrite)
    return evaluation.run(target, real, progress)


@dataclass
class Evaluation:
    """An evaluation: its cases and scoring (plan), rules (protocol), sampling settings, and measuring networks.

    Usage::

        evaluation = Evaluation.open(pipe, protocol=load_protocol("set5-x4"), spec="folder:Set5@all")
        report = evaluation.run(evaluation.claim())
    """

    pipe: Pipeline
    plan: Plan
    protocol: Protocol | None
    sampling: SampleConfig
    networks: MeasuringNetworks
    seed: int = 0
    num: int = DEFAULT_NUM
    moved: Sequence[str] = ()
    started: float = field(default_factory=time.time)

    @classmethod
    def open(
        cls,
        pipe: Pipeline,
        *,
        protocol: Protocol | None = None,
        spec: str | None = None,
        split: str | None = None,
        num: int | None = None,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        moved: Sequence[str] = (),
    ) -> "Evaluation":
        """Opens the data; arguments as those of `evaluate`."""
        if num is None:
            num = DEFAULT_NUM if protocol is None else protocol.choose or ALL
        split = split or ("test" if protocol is None else protocol.split)
        networks = MeasuringNetworks(
            {} if protocol is None else protocol.networks, pipe.device, pipe.task.Scoring.networks_by_role
        )
        work = plan(pipe, protocol, spec, split, num, networks)
        if work.cases.examples is not None:
            work.cases.examples.cache_bytes = MEMORY
        return cls(pipe, work, protocol, pipe.sample_settings(**(settings or {})), networks, seed, num, moved)

    def run(self, folder: Path, real: Statistics | None = None, progress: Progress | None = None) -> Report | None:
        """Scores the unfinished cases and writes the files; None on all processes but the first.

        real: statistics of the real pictures, for a protocol with a distance (see `real_pictures`). Raises UserError if
        another process is writing to `folder`.
        """
        lock = FolderLock(folder)
        distributed.on_main(lock.acquire)
        try:
            return self._run(folder, real, progress)
        finally:
            lock.release()

    def _run(self, folder: Path, real: Statistics | None, progress: Progress | None) -> Report | None:
        """As `run`, with the folder locked."""
        # By the first process alone: a slower one would remove what the first has begun to write.
        distributed.on_main(lambda: remove_temporaries(folder))
        trivial, notes = self._trivial()
        ledger = self._score(folder / UNFINISHED, trivial, real is not None, progress)
        if ledger is None:
            return None
        report = self._report(folder, ledger, real, notes)
        record(folder, RESULTS & output_files(folder))
        ledger.remove()
        return report

    def claim(self, folder: Path | None = None, *, default: Path | None = None, overwrite: bool = False) -> Path:
        """The folder to write to, the same in every process: where this evaluation was interrupted, else one without
        results. Raises UserError if `folder` contains something else.
        """

        def interrupted(place: Path) -> bool:
            return Ledger.holds(place / UNFINISHED, self._unchanging())

        named = default or self.default_folder()
        return distributed.on_main(lambda: claim(named, folder, overwrite=overwrite, resumable=interrupted))

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers: data, model, sampling, protocol; neither times nor machines."""
        return manifest.identity(self.pipe, self.plan, self.protocol, self.sampling, seed=self.seed, num=self.num)

    def _unchanging(self) -> dict[str, Any]:
        """What an interrupted evaluation must share to be continued; batches change nothing but the last bits."""
        about = self.identity()
        return {**about, "sample": {**about["sample"], "batch_size": None}}

    def default_folder(self) -> Path:
        """RUN/evaluation/NAME; the name contains all settings that differ from the run's own. A model that ships with
        the package is not written to: outputs/evaluation/MODEL-NAME.
        """
        cases, pipe, sampling = self.plan.cases, self.pipe, self.sampling
        place = cases.spec.partition("?")[0].rstrip("/").rpartition("/")[2].replace(":", "-")
        place = place if self.protocol is None else f"{self.protocol.name}-{place}"
        named = {"solver": sampling.solver, "steps": sampling.steps, "batch_size": sampling.batch_size}
        recipe = {**pipe.settings.model_dump(mode="json"), **named}
        changed = {name: value for name, value in sampling.model_dump(mode="json").items() if value != recipe[name]}
        changed |= {"seed": self.seed} if self.seed else {}
        words = [f"{name}{value}".replace(" ", "") for name, value in changed.items()]
        words += [pipe.weights] * (pipe.weights != "ema") + ["autoguided"] * (pipe.weak is not None)
        words += [f"adapter{scale:g}" for scale in pipe.adapters.values() if scale != 1]
        name = "-".join([place, cases.split, f"{sampling.solver}{sampling.steps}", *words])
        if pipe.folder is not None and pipe.folder in shipped_models().values():
            return Path("outputs") / "evaluation" / f"{pipe.folder.name}-{name}"
        return (pipe.folder or Path("outputs")) / "evaluation" / name

    def real_pictures(self, path: Path | None, progress: Progress | None = None) -> Statistics | None:
        """Statistics of the real pictures, from a file or computed; None for a protocol without distances."""
        rules = None if self.protocol is None else self.protocol.distribution
        if self.protocol is None or rules is None:
            if path is not None:
                raise UserError("--statistics is for protocols with a distance, such as coco-fid30k.")
            return None
        if path is not None:
            statistics = read_statistics(path)
            statistics.expect_network(self.networks.features)
            return statistics
        examples = self.plan.cases.examples
        assert examples is not None
        if rules.reference == "train":
            examples = self._training_split(examples.reader.spec)
        elif rules.reference == "split" and self.protocol.choose is not None:
            reader = examples.reader
            examples = self.pipe.dataset(reader.split, reader.spec, options=self.protocol.reader)
            examples.cache_bytes = 0
        return reference(self.protocol, examples, self.networks.features, progress)

    def _training_split(self, spec: str) -> Examples:
        """The training pictures of the evaluated data. Raises UserError for data without any."""
        assert self.protocol is not None
        advice = (
            "Give --statistics FILE: published statistics (an .npz with mu and sigma), or those that crossflow "
            "statistics computes from training pictures."
        )
        if self.plan.cases.split == "all":
            raise UserError(
                f"{self.protocol.name} compares with the training pictures of its data, but all of {spec} is scored. "
                f"{advice}"
            )
        try:
            examples = self.pipe.dataset("train", spec, options=self.protocol.reader)
        except UserError as error:
            raise UserError(
                f"{self.protocol.name} compares with the training pictures of its data, which are unavailable: {error} "
                f"{advice}"
            ) from error
        examples.cache_bytes = 0
        return examples

    # -- scoring

    def _score(
        self, folder: Path, trivial: Trivial | None, with_features: bool, progress: Progress | None
    ) -> Ledger | None:
        """Scores the unfinished cases; the first process gets the ledger, the others None."""
        ledger = Ledger(folder, self._unchanging()) if distributed.is_main() else None
        finished: set[int] = distributed.on_main(lambda: ledger.finished() if ledger is not None else set())
        total, done = len(self.plan.cases), len(finished)
        todo = [number for number in range(total) if number not in finished]
        metric = self.plan.scoring.metric(thorough=True)

        def judge(sampled: _Sampled) -> Part:
            return self._judged(sampled, metric, trivial, with_features)

        parts = list(batches(todo, self.sampling.batch_size))
        for numbers, part in distributed.shared_in_stages(parts, self._sampled, judge):
            assert ledger is not None
            ledger.add(part)
            done += len(numbers)
            if progress is not None:
                progress(done, total)
        return ledger

    def _sampled(self, numbers: Sequence[int]) -> "_Sampled":
        """The outputs for the cases with these numbers."""
        cases = self.plan.cases
        before = dict(cases.bad)
        batch = dict(cases.at(numbers))
        bad = {id: why for id, why in cases.bad.items() if id not in before}
        ids, inputs = [case.id for case in batch.values()], [case.input for case in batch.values()]
        outputs = self.pipe.outputs(inputs, ids, self.seed, self.sampling) if batch else []
        return _Sampled(list(numbers), batch, outputs, bad)

    def _judged(self, sampled: "_Sampled", metric: TaskMetric, trivial: Trivial | None, with_features: bool) -> Part:
        """The part of some outputs: rows of them and of the trivial ones, tiles and features."""
        scoring, outputs, cases = self.plan.scoring, sampled.outputs, list(sampled.cases.values())
        part = Part(sampled.numbers, {}, bad=sampled.bad)
        if not cases:
            return part
        ids, truths = [case.id for case in cases], [case.truth for case in cases]
        part.rows = dict(zip(sampled.cases, metric.add_all(ids, outputs, truths), strict=True))
        if trivial is not None:
            rows = scoring.metric().add_all(ids, [trivial(case) for case in cases], truths)
            part.trivial = dict(zip(sampled.cases, rows, strict=True))
        for (number, case), output in zip(sampled.cases.items(), outputs, strict=True):
            if number < NUM_TILES:
                part.pages[number] = scoring.tiles(case, output)
        if with_features:
            part.arrays = self._features(outputs)
        return part

    def _trivial(self) -> tuple[Trivial | None, list[str]]:
        """The function for trivial outputs, and notes: on scored training items, or on why there is no baseline."""
        notes: list[str] = []

        def open_train() -> Examples:
            train = self.pipe.dataset("train")
            if self.plan.cases.examples is not None:
                notes.extend(overlap_with_training(train, self.plan.cases.examples))
            return train

        try:
            return self.plan.scoring.trivial(open_train), notes
        except UserError as error:  # a run is complete without its training data, and can be scored without them
            return None, [f"no trivial baseline, which is made from the training data: {error}"]

    def _features(self, outputs: Sequence[Any]) -> dict[str, Any]:
        """Features of generated pictures, resized like the real ones."""
        assert self.protocol is not None
        assert self.protocol.distribution is not None
        pictures = [prepare(self.protocol.distribution, output) for output in outputs]
        usable = [picture for picture in pictures if picture is not None]
        if len(usable) < len(outputs):
            raise UserError(
                f"{self.protocol.name} compares pictures of {self.protocol.distribution.size} px or more; "
                f"this run makes pictures of {min(outputs[0].shape[:2])} px."
            )
        return self.networks.features(usable)

    # -- reporting

    def _report(self, folder: Path, ledger: Ledger, real: Statistics | None, remarks: Sequence[str]) -> Report:
        finished = Finished.of(ledger)
        metric = self.plan.scoring.metric(thorough=True)
        metric.replace(finished.rows)
        values = metric.compute()
        notes = list(metric.notes)
        if real is not None:
            numbers, more = self._distances(ledger, real)
            values, notes = {**numbers, **values}, notes + more
        notes += [*self._partial(len(finished.rows)), *remarks]
        scores = Scores(values, metric.intervals(), metric.rows, finished.pages, notes)
        about = {
            **self.identity(),
            **manifest.items([row["id"] for row in finished.rows], {**self.plan.cases.bad, **finished.bad}),
            "networks": dict(self.networks.checksums),
            "real_statistics": None if real is None else {"count": real.count, **real.about},
            "set": list(self.moved),
            **manifest.circumstances(self.started, self.pipe.device),
        }
        report = Report(folder, scores, self._baseline(finished.trivial), about)
        _write(report, f"{self.pipe.task.name} on {self.plan.cases.spec} ({self.plan.cases.split})")
        return report

    def _distances(self, ledger: Ledger, real: Statistics) -> tuple[dict[str, float], list[str]]:
        assert self.protocol is not None
        assert self.protocol.distribution is not None
        network = self.networks.features
        arrays = (part.arrays for part in ledger.parts() if part.arrays)
        values, notes = distances(self.protocol.distribution.numbers, arrays, real, network.is_inception)
        if not network.is_inception:
            notes.append(f"distances by {network.words} are not FID, KID or IS and compare only among themselves")
        return values, notes

    def _partial(self, scored: int) -> list[str]:
        if self.protocol is None or self.protocol.num_items in (None, scored):
            return []
        return [
            f"partial: {scored} items were scored, but {self.protocol.name} has {self.protocol.num_items}; the numbers "
            "are not those of the protocol"
        ]

    def _baseline(self, rows: Sequence[Row]) -> dict[str, float]:
        """Scores of the trivial output."""
        if not rows:
            return {}
        metric = self.plan.scoring.metric()
        metric.replace(rows)
        return metric.compute()


@dataclass(frozen=True)
class _Sampled:
    """A batch before it is judged; cases: the usable ones by number; bad: why others, by id, are not."""

    numbers: list[int]
    cases: dict[int, Case]
    outputs: list[Any]
    bad: dict[str, str]


def _write(report: Report, title: str) -> None:
    scores = report.scores
    report.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "scores": scores.values,
        "intervals": scores.intervals,
        "baseline": report.baseline,
        "notes": scores.notes,
        "manifest": report.manifest,
    }
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows)
    write_atomically(report.folder / "items.jsonl", "".join(lines))
    write_page(report.folder, title, content, scores.pages)
    write_atomically(report.folder / "metrics.json", json.dumps(content, indent=1, ensure_ascii=False))
