"""The checks of a run. Each looks at the evidence for one disease and yields what it finds, in plain sentences.

Thresholds are set so that none speaks on the shipped tiny recipes, and each on a run made to have its disease
(tests/engine/health).
"""

import statistics
from collections.abc import Callable, Iterator

from crossflow.core.files import size_in_words
from crossflow.core.training.bad_steps import BAD_STEPS
from crossflow.engine.health.evidence import Evidence
from crossflow.engine.health.finding import Finding
from crossflow.engine.run_log import Curve

Check = Callable[[Evidence], Iterator[Finding]]
MIN_REPORTS = 4
"""Reports of a training from which a trend is read."""


def examine(evidence: Evidence) -> list[Finding]:
    """What is wrong with a run: problems first. Empty for a healthy one."""
    findings = [finding for check in CHECKS for finding in check(evidence)]
    return sorted(findings, key=lambda finding: finding.severity)  # "problem" before "warning"


# -- losses


def finite_numbers(evidence: Evidence) -> Iterator[Finding]:
    """Losses and scores that are NaN or infinite."""
    if bad := evidence.log.lines.get("bad", []):
        yield Finding(
            "bad steps",
            f"Losses or gradients were NaN or infinite in {len(bad)} step{'s' * (len(bad) > 1)}, the last of them step "
            f"{bad[-1]['step']} ({', '.join(bad[-1].get('not_finite', []))}).",
            f"Look at the items that {evidence.run.path / BAD_STEPS} lists, and lower train.lr (now "
            f"{evidence.config.train.lr:g}) or lengthen train.warmup_steps.",
        )
    for kind in ("train", "val"):
        for name in evidence.log.names(kind):
            curve = evidence.log.curve(name, kind)
            if name != "unconditional" and not curve.finite:
                step = next(s for s, value in zip(curve.steps, curve.values, strict=True) if value != value)
                yield Finding(
                    "not finite",
                    f"{name} ({kind}) was NaN or infinite at step {step}.",
                    "Resume from a checkpoint before it with a smaller train.lr or a longer train.warmup_steps, and "
                    "look for values in the data that are not finite.",
                )
                return
    if wrong := [name for name, value in evidence.scores.get("scores", {}).items() if value is None or value != value]:
        yield Finding(
            "not finite",
            f"The scores {', '.join(wrong)} are undefined.",
            "Outputs that are not finite cannot be scored: look at samples/final.png, and at the losses above.",
        )


def trend(evidence: Evidence) -> Iterator[Finding]:
    """A flow loss that rises or never falls."""
    curve = _flow(evidence)
    if len(curve.values) < MIN_REPORTS:
        return
    first, *_, last = quarters = curve.quarters()
    if last > 1.3 * min(quarters):
        yield Finding(
            "rising loss",
            f"The {curve.name} loss has risen: its lowest quarter of the training had {min(quarters):.4g}, the last "
            f"{last:.4g}.",
            f"Lower train.lr (now {evidence.config.train.lr:g}) or lengthen train.warmup_steps (now "
            f"{evidence.config.train.warmup_steps}).",
        )
    elif last > 0.97 * first and evidence.step > 2 * evidence.config.train.warmup_steps:
        yield Finding(
            "no progress",
            f"The {curve.name} loss has not fallen: {first:.4g} in the first quarter of the training, {last:.4g} in "
            "the last.",
            f"Check train.lr (now {evidence.config.train.lr:g}) and look at the data with crossflow data check.",
        )


def reference_band(evidence: Evidence) -> Iterator[Finding]:
    """A flow loss above that of the recipe's reference runs."""
    reference, curve = evidence.reference, _flow(evidence)
    band = None if reference is None else reference.train.get(curve.name)
    if reference is None or band is None or not curve.values:
        return
    late = max(1, len(curve.values) // 4)
    ratios = [value / band.at(step)[2] for step, value in zip(curve.steps[-late:], curve.values[-late:], strict=True)]
    if (ratio := statistics.median(ratios)) > 1.25:
        step = min(curve.steps[-1], reference.steps)
        low, _, high = band.at(step)
        yield Finding(
            "above the reference",
            f"The {curve.name} loss is {curve.values[-1]:.4g} at step {curve.steps[-1]}, {ratio:.1f} times the top of "
            f"the band of {reference.recipe} ({low:.4g} to {high:.4g} at step {step}).",
            _advice_on_differences(evidence),
        )


def held_out(evidence: Evidence) -> Iterator[Finding]:
    """A held-out loss that rises while training continues."""
    curve = evidence.log.curve("flow", "val").without_gaps()
    if len(curve.values) > 1 and curve.values[-1] > 1.2 * min(curve.values):
        best = curve.steps[curve.values.index(min(curve.values))]
        yield Finding(
            "overfitting",
            f"The flow loss on held-out items has risen from {min(curve.values):.4g} at step {best} to "
            f"{curve.values[-1]:.4g}.",
            "Train on more data, with augmentation or for fewer steps, or use the checkpoint of the lowest loss.",
            "warning",
        )


def _flow(evidence: Evidence) -> Curve:
    """The flow loss, or the total where no flow is trained, without values that are not finite."""
    name = "flow" if "flow" in evidence.log.losses() else "loss"
    return evidence.log.curve(name).without_gaps()


def _advice_on_differences(evidence: Evidence) -> str:
    assert evidence.recipe is not None
    different = evidence.recipe.differences(evidence.config)
    if not different:
        return "Its settings are those of the recipe: check the data, and whether the code has been changed."
    listed = ", ".join(f"{name}={value}" for name, value in different.items())
    return f"The settings that differ from the recipe are the first suspects: {listed}."


# -- optimizer


def learning_rate(evidence: Evidence) -> Iterator[Finding]:
    """A learning rate far above the recipe's."""
    if evidence.recipe is None:
        return
    train, recipe = evidence.config.train, evidence.recipe
    if train.optimizer != recipe.settings.get("train.optimizer"):
        return
    ratio = train.lr / float(recipe.settings["train.lr"])
    if ratio >= 10:
        yield Finding(
            "learning rate",
            f"train.lr={train.lr:g} is {ratio:.0f} times that of {recipe.recipe} "
            f"({float(recipe.settings['train.lr']):g}).",
            "Lower it, unless you have measured that this model bears it.",
        )


def gradient_norm(evidence: Evidence) -> Iterator[Finding]:
    """Gradients that explode or vanish."""
    curve = evidence.log.curve("grad_norm").without_gaps()
    if len(curve.values) < MIN_REPORTS:
        return
    quarters = curve.quarters()
    usual = statistics.median(quarters[:-1])
    if quarters[-1] > 10 * usual:
        yield Finding(
            "gradient explosion",
            f"The gradient norm has grown from {usual:.4g} to {quarters[-1]:.4g}.",
            f"Lower train.lr (now {evidence.config.train.lr:g}), and keep train.grad_clip above 0.",
        )
    if quarters[-1] < 1e-7:
        yield Finding(
            "vanished gradient",
            f"The gradient norm is {quarters[-1]:.1e}, so nothing is learned.",
            "Check the weights of the losses (loss.flow_weight, loss.encoder_weight) and the data.",
        )


def skipped_steps(evidence: Evidence) -> Iterator[Finding]:
    """Many steps that were left out of the weights."""
    curve = evidence.log.curve("skipped_steps").without_gaps()
    if curve.values and curve.values[-1] > max(20, 0.02 * curve.steps[-1]):
        yield Finding(
            "skipped steps",
            f"{curve.values[-1]:.0f} of {curve.steps[-1]} steps were skipped, since their losses or gradients "
            "were not finite.",
            "With fp16 gradients overflow: train with train.precision=bf16. Otherwise see bad_steps.jsonl.",
        )


def averaged_weights(evidence: Evidence) -> Iterator[Finding]:
    """A moving average that is too slow for the length of the run."""
    train = evidence.config.train
    span = 1 / (1 - train.ema)
    if train.steps and span > train.steps / 2:
        yield Finding(
            "slow average",
            f"train.ema={train.ema:g} averages the weights over {span:,.0f} steps, and the run has {train.steps:,}.",
            f"Take a decay of at most {max(0.0, 1 - 5 / train.steps):.4g} for such a short run, or train longer.",
            "warning",
        )
    losses = evidence.measured.losses if evidence.measured is not None else {}
    if {"ema", "model"} <= set(losses) and losses["ema"]["flow"] > 1.1 * losses["model"]["flow"]:
        yield Finding(
            "lagging average",
            f"The averaged weights have a held-out flow loss of {losses['ema']['flow']:.4g}, the last weights "
            f"{losses['model']['flow']:.4g}: the average lags behind.",
            f"Lower train.ema (now {train.ema:g}) or train longer; --weights model uses the last weights.",
            "warning",
        )


# -- the source encoder


def posterior(evidence: Evidence) -> Iterator[Finding]:
    """A source posterior that has collapsed or exploded."""
    numbers = evidence.measured.posterior if evidence.measured is not None else None
    if numbers is None:
        return
    weight = f"loss.kl_weight (now {evidence.config.loss.kl_weight:g})"
    if numbers.active < 0.02:
        width = "" if numbers.deviation is None else f", and the posterior is {numbers.deviation:.2g} wide"
        yield Finding(
            "collapsed posterior",
            f"The source posterior has collapsed: the means of {numbers.num_items} items lie {numbers.spread:.2g} "
            f"apart{width}, so the latent says nothing about the input.",
            f"Lower {weight}, or take loss.kl=released, which leaves the means free.",
        )
    sizes = [("a mean", numbers.largest, 30.0), ("a deviation", numbers.largest_deviation or 0.0, 10.0)]
    for name, value, limit in sizes:
        if value > limit:
            yield Finding(
                "exploding KL",
                f"The source posterior explodes: {name} of {value:.3g} where the target has unit variance"
                f"{'' if numbers.kl is None else f', and a KL of {numbers.kl:.3g} nats per value of the latent'}.",
                f"Raise {weight}, or lower train.lr.",
            )
            return


def rising_kl(evidence: Evidence) -> Iterator[Finding]:
    """A regulariser that grows without bound."""
    curve = evidence.log.curve("kl").without_gaps()
    if len(curve.values) < MIN_REPORTS:
        return
    quarters = curve.quarters()
    if quarters[-1] > 10 * max(1.0, min(quarters)) and quarters[-1] > 2 * quarters[-2]:
        yield Finding(
            "growing KL",
            f"The KL of the source posterior has grown from {min(quarters):.4g} to {quarters[-1]:.4g} and goes on "
            "growing.",
            f"Raise loss.kl_weight (now {evidence.config.loss.kl_weight:g}), or lower train.lr.",
        )


def ignored_source(evidence: Evidence) -> Iterator[Finding]:
    """Outputs that do not depend on the input."""
    losses: list[tuple[float, float]] = []
    if evidence.measured is not None:
        losses += [(each["flow"], each["flow_shuffled"]) for each in evidence.measured.losses.values()]
    elif evidence.log.lines.get("val"):
        line = evidence.log.lines["val"][-1]
        losses += [(line["flow"], line["flow_shuffled"])] if line.get("flow_shuffled") is not None else []
    if losses and losses[0][1] < 1.01 * losses[0][0]:
        flow, shuffled = losses[0]
        yield Finding(
            "ignored source",
            f"The inputs do not matter: the held-out flow loss is {flow:.4g} with an item's own input and "
            f"{shuffled:.4g} with that of another.",
            "Check that inputs and targets of the data belong together (crossflow data check draws them), then train "
            "longer or strengthen loss.encoder.",
        )


# -- guidance


def unconditional(evidence: Evidence) -> Iterator[Finding]:
    """Guidance without unconditional samples in training."""
    drop, guidance = evidence.config.guidance.drop, evidence.config.sample.guidance
    if drop == 0 and guidance != 1:
        yield Finding(
            "unguided training",
            f"sample.guidance={guidance:g} needs a velocity that the run never learns: guidance.drop is 0.",
            "Train with guidance.drop=0.1, or sample with sample.guidance=1.",
        )
    curve = evidence.log.curve("unconditional").without_gaps()
    share = statistics.fmean(curve.values) if curve.values else drop
    num_samples = evidence.step * evidence.config.train.batch_size
    if drop > 0 and drop * num_samples >= 20 and share < drop / 2:
        yield Finding(
            "no unconditional samples",
            f"{share:.1%} of the samples were unconditional, and guidance.drop={drop:g} asks for {drop:.0%}: a step "
            f"of {evidence.config.train.batch_size} samples rarely draws the two that can exchange their targets.",
            "Raise train.batch_size (with train.accumulate, if memory is short) or guidance.drop.",
        )


# -- data, speed and disk


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
        yield Finding(
            "data-bound",
            f"The training waits for its data {share:.0%} of the time.",
            f"Raise train.num_workers (now {workers}), put the data on a faster disk, or compute features once with "
            "crossflow cache.",
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
            _advice_on_differences(evidence),
        )


def _listed(evidence: Evidence, names: list[str]) -> str:
    return ", ".join(f"{name} {evidence.scores['scores'][name]:.4g}" for name in names)


def _baseline(evidence: Evidence, name: str) -> float | None:
    """What the trivial output scores or, where a metric brings its own control, outputs of shuffled inputs."""
    control: float | None = evidence.scores["scores"].get(f"shuffled_{name}")
    baseline: float | None = evidence.scores["baseline"].get(name, control)
    return baseline


def _reaches_baseline(evidence: Evidence, name: str) -> bool:
    """Whether a score cannot be told from the baseline's: its interval holds the latter."""
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


CHECKS: tuple[Check, ...] = (
    *(finite_numbers, trend, reference_band, held_out, learning_rate, gradient_norm, skipped_steps, averaged_weights),
    *(posterior, rising_kl, ignored_source, unconditional, validation_data, data_bound, disk, length, scored),
)
