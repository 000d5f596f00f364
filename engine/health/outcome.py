"""Checks of what stands around a training: its data and disk, its length, its scores."""

import statistics
from collections.abc import Iterator

from crossflow.core.files import size_in_words
from crossflow.engine.health.evidence import Evidence
from crossflow.engine.health.finding import Finding

# -- data, speed and disk

FEW = 8
"""Fewer scored items than this have intervals that hold nearly every score."""


def validation_data(evidence: Evidence) -> Iterator[Finding]:
    """Validation on training items."""
    measured = evidence.measured
    if measured is not None and measured.num_shared:
        spec = evidence.config.data.val or evidence.config.data.train
        yield Finding(
            "validation on training data",
            f"{measured.num_shared} of {measured.num_items} validation items are training items too, so scores say "
            "nothing about new inputs.",
            f"Take another split or other data for data.val (now {spec}).",
        )


def data_bound(evidence: Evidence) -> Iterator[Finding]:
    """Steps that wait for their data."""
    waiting, seconds = evidence.log.curve("data_seconds"), evidence.log.curve("seconds_per_step")
    if not waiting.values or len(waiting.values) != len(seconds.values):
        return
    shares = [wait / max(step, 1e-9) for wait, step in zip(waiting.values, seconds.values, strict=True)]
    # A GPU computes while the host waits: only where nothing but waiting is left, the data are what bounds the step.
    limit = 0.8 if evidence.run.read_manifest().get("gpu") else 0.5
    if (share := statistics.median(shares)) > limit:
        workers = evidence.config.train.num_workers
        workers_now = "chosen by the cores" if workers is None else workers
        yield Finding(
            "data-bound",
            f"The training waits for its data {share:.0%} of the time.",
            f"Raise train.num_workers (now {workers_now}), put the data on a faster disk, or compute features once "
            "with crossflow cache.",
            "warning",
        )


def disk(evidence: Evidence) -> Iterator[Finding]:
    """Too little room for the next checkpoints."""
    unfinished = evidence.step < evidence.config.train.steps
    held = len(evidence.run.checkpoints)
    # While one is written, `keep` older ones are still there.
    needed = evidence.checkpoint_bytes * max(1, evidence.config.train.keep + 1 - held)
    if unfinished and evidence.free_bytes < needed:
        yield Finding(
            "disk",
            f"{size_in_words(evidence.free_bytes)} are free, and the next checkpoints need {size_in_words(needed)}.",
            "Free some space, or lower train.keep.",
        )


# -- length and scores


def length(evidence: Evidence) -> Iterator[Finding]:
    """Trainings that are unfinished or too short."""
    train, step = evidence.config.train, evidence.step
    if step < train.steps:
        yield Finding(
            "unfinished",
            f"The run is at step {step} of {train.steps}.",
            f"Unless it is still running, continue it: crossflow train --output {evidence.run.path} --resume auto.",
            "warning",
        )
    if train.warmup_steps > train.steps / 2 > 0:
        yield Finding(
            "too short",
            f"{train.warmup_steps} of the {train.steps} steps are warm-up, in which the learning rate only rises.",
            "Raise train.steps or lower train.warmup_steps.",
        )
    reference = evidence.reference
    usual = 0 if reference is None else int(reference.settings["train.steps"])
    if reference is not None and train.steps < 0.5 * usual:
        yield Finding(
            "too short",
            f"The run has {train.steps} steps, and {reference.recipe} takes {usual}.",
            "Continue it with a larger train.steps; with a cosine schedule a new run is better.",
            "warning",
        )


def scored(evidence: Evidence) -> Iterator[Finding]:
    """Scores that are missing, below the reference's, or no better than trivial ones."""
    train, scores = evidence.config.train, evidence.scores
    if not scores:
        if evidence.step >= train.steps:
            yield Finding(
                "unscored",
                "The run has all its steps and no scores.",
                f"Score it: crossflow train --output {evidence.run.path} --resume auto.",
            )
        return
    trivial = [name for name in evidence.headline if _reaches_baseline(evidence, name)]
    judged = [name for name in evidence.headline if _baseline(evidence, name) is not None]
    if judged and trivial == judged:
        yield Finding(
            "trivial scores",
            f"The run scores no better than the trivial baseline: {_listed(evidence, trivial)}.",
            "Train longer, and look at samples/final.png for what its outputs lack.",
        )
    reference = evidence.reference
    worse = [] if reference is None else [name for name in evidence.headline if _is_worse(evidence, name)]
    if reference is not None and worse:
        bands = ", ".join(f"{reference.scores[name].low:.4g} to {reference.scores[name].high:.4g}" for name in worse)
        yield Finding(
            "scores below the reference",
            f"Scores are worse than those of {reference.recipe}: {_listed(evidence, worse)} (reference {bands}).",
            evidence.advice_on_differences(),
        )


def _listed(evidence: Evidence, names: list[str]) -> str:
    return ", ".join(f"{name} {evidence.scores['scores'][name]:.4g}" for name in names)


def _baseline(evidence: Evidence, name: str) -> float | None:
    """What the trivial output scores or, where a metric brings its own control, outputs of shuffled inputs."""
    control: float | None = evidence.scores["scores"].get(f"shuffled_{name}")
    baseline: float | None = evidence.scores["baseline"].get(name, control)
    return baseline


def _reaches_baseline(evidence: Evidence, name: str) -> bool:
    """Whether a score cannot be told from the baseline's: its interval holds the latter. Few items tell nothing."""
    if evidence.scores["scores"].get("num_items", FEW) < FEW:
        return False
    interval, baseline = evidence.scores["intervals"].get(name), _baseline(evidence, name)
    return interval is not None and baseline is not None and interval[0] <= baseline <= interval[1]


def _is_worse(evidence: Evidence, name: str) -> bool:
    """Whether the whole interval of a score lies on the baseline's side of the reference's, by a tenth of what the
    reference gains over the baseline: no more than other seeds may differ.
    """
    assert evidence.reference is not None
    band, interval = evidence.reference.scores.get(name), evidence.scores["intervals"].get(name)
    if band is None or interval is None:
        return False
    middle = (band.low + band.high) / 2
    # Where the metric brings its own control and no baseline is scored, more is better.
    gain = middle - (0.0 if band.baseline is None else band.baseline)
    if gain > 0:
        return bool(interval[1] < band.low - 0.1 * gain)
    return bool(interval[0] > band.high - 0.1 * gain)
