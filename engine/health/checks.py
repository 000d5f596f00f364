"""The checks of a run. Each looks at the evidence for one disease and yields what it finds, in plain sentences.

Thresholds are set so that none speaks on the shipped tiny recipes, and each on a run made to have its disease
(tests/engine/health).
"""

from collections.abc import Callable, Iterator

from crossflow.engine.health import latents, losses, outcome
from crossflow.engine.health.evidence import Evidence
from crossflow.engine.health.finding import Finding

CHECKS: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    *(losses.finite_numbers, losses.trend, losses.reference_band, losses.held_out, losses.learning_rate),
    *(losses.gradient_norm, losses.skipped_steps, losses.averaged_weights),
    *(latents.posterior, latents.rising_kl, latents.ignored_source, latents.unconditional),
    *(outcome.validation_data, outcome.data_bound, outcome.disk, outcome.length, outcome.scored),
)


def examine(evidence: Evidence) -> list[Finding]:
    """What is wrong with a run: problems first. Empty for a healthy one."""
    findings = [finding for check in CHECKS for finding in check(evidence)]
    return sorted(findings, key=lambda finding: finding.severity)  # "problem" before "warning"
