"""A run in numbers: what `crossflow doctor` prints above its findings."""

from crossflow.core.files import size_in_words
from crossflow.engine.health.evidence import Evidence, Measured


def describe(evidence: Evidence) -> dict[str, str]:
    """Subject -> numbers, with those of the recipe's reference runs beside them."""
    facts = {"step": f"{evidence.step} of {evidence.config.train.steps}", "recipe": _recipe(evidence)}
    for name in (*evidence.log.losses(), "grad_norm"):
        facts[name] = _with_band(evidence, name)
    facts |= _speed(evidence)
    if evidence.measured is None:
        facts["measured"] = f"nothing, since {evidence.not_measured}"
    else:
        facts |= _measured(evidence.measured)
    scores = evidence.scores.get("scores", {})
    for name in evidence.headline:
        if scores.get(name) is not None:
            facts[name] = _score(evidence, name)
    if evidence.checkpoint_bytes:
        sizes = size_in_words(evidence.checkpoint_bytes), size_in_words(evidence.free_bytes)
        facts["checkpoint"] = f"{sizes[0]}; {sizes[1]} free"
    return {name: value for name, value in facts.items() if value}


def _recipe(evidence: Evidence) -> str:
    recipe = evidence.recipe
    if recipe is None:
        return "no reference of this task"
    runs = f"{recipe.num_runs} run{'s' * (recipe.num_runs > 1)} of {recipe.steps} steps"
    if evidence.reference is not None:
        return f"{recipe.recipe} (reference: {runs})"
    different = list(recipe.differences(evidence.config))
    listed = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
    return f"no reference; {recipe.recipe} is nearest, but differs in {listed}"


def _with_band(evidence: Evidence, name: str) -> str:
    curve = evidence.log.curve(name).without_gaps()
    if not curve.values:
        return ""
    text = f"{curve.values[0]:.4g} at step {curve.steps[0]}"
    if len(curve.steps) > 1:
        text += f", {curve.values[-1]:.4g} at {curve.steps[-1]}"
    band = None if evidence.reference is None else evidence.reference.train.get(name)
    if band is None:
        return text
    low, _, high = band.at(curve.steps[-1])
    return f"{text} (reference {low:.4g} to {high:.4g})"


def _speed(evidence: Evidence) -> dict[str, str]:
    seconds, waiting, share = (
        evidence.log.curve(name).without_gaps() for name in ("seconds_per_step", "data_seconds", "unconditional")
    )
    facts = {}
    if seconds.values:
        wait = f", of which {waiting.last_quarter():.3g} waiting for data" if waiting.values else ""
        facts["seconds per step"] = f"{seconds.last_quarter():.3g}{wait}"
    if share.values:
        drop = evidence.config.guidance.drop
        facts["unconditional"] = f"{sum(share.values) / len(share.values):.1%} of the samples (guidance.drop={drop:g})"
    return facts


def _measured(measured: Measured) -> dict[str, str]:
    facts = {}
    for weights, losses in measured.losses.items():
        facts[f"held out, {weights}"] = (
            f"flow {losses['flow']:.4g}, with other inputs {losses['flow_shuffled']:.4g} ({measured.num_items} items)"
        )
        facts[f"one step, {weights}"] = (
            f"from t = 0 it errs by {losses['one_step']:.4g} (mean square) of the targets' variance "
            f"{losses['target_variance']:.4g}"
        )
    numbers = measured.posterior
    if numbers is None:
        return facts
    facts["posterior mean"] = (
        f"{numbers.size:.3g} in size, at most {numbers.largest:.3g}; items lie {numbers.spread:.3g} apart in "
        f"{numbers.active:.0%} of {measured.latent_size} values"
    )
    if numbers.deviation is not None:
        facts["posterior deviation"] = f"{numbers.deviation:.3g}, at most {numbers.largest_deviation:.3g}"
        facts["KL per value"] = f"{numbers.kl:.3g} nats, at most {numbers.largest_kl:.3g}"
    for name, (low, middle, high) in numbers.by_value.items():
        facts[f"{name} by value"] = f"{low:.3g}, {middle:.3g}, {high:.3g} at 5, 50, 95 % of the values"
    return facts


def _score(evidence: Evidence, name: str) -> str:
    text = f"{evidence.scores['scores'][name]:.4g}"
    interval = evidence.scores["intervals"].get(name)
    if interval is not None:
        text += f" ({interval[0]:.4g} to {interval[1]:.4g})"
    band = None if evidence.reference is None else evidence.reference.scores.get(name)
    return text if band is None else f"{text} (reference {band.low:.4g} to {band.high:.4g})"
