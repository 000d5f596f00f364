"""Checks of what a run does with its source: the posterior, the influence of inputs, guidance."""

import statistics
from collections.abc import Iterator

from crossflow.engine.health.evidence import Evidence
from crossflow.engine.health.finding import Finding
from crossflow.engine.health.losses import MIN_REPORTS


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
