"""Checks of what a training has logged: its losses, its gradients and its averaged weights."""

import statistics
from collections.abc import Iterator

from crossflow.core.training.bad_steps import BAD_STEPS
from crossflow.engine.health.evidence import Evidence
from crossflow.engine.health.finding import Finding
from crossflow.engine.run_log import Curve

MIN_REPORTS = 4
"""Reports of a training from which a trend is read."""


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
            evidence.advice_on_differences(),
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
