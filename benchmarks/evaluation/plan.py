"""The plan of an evaluation: a task's cases and scoring, by a protocol or by the task's own rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from crossflow.benchmarks.evaluation.protocol import Protocol
from crossflow.core.errors import UserError
from crossflow.data.cases import Cases
from crossflow.engine.sample import Pipeline
from crossflow.tasks.base import Scoring

SEED = 0
"""Of the choice of items and prompts, which must not depend on the seed that a run was trained with."""


@dataclass(frozen=True)
class Plan:
    """The cases of an evaluation, and how they are scored."""

    cases: Cases
    scoring: Scoring


def plan(
    pipe: Pipeline,
    protocol: Protocol | None,
    spec: str | None,
    split: str,
    num: int,
    networks: Mapping[str, Any] | None = None,
) -> Plan:
    """The cases of at most `num` items of a split of the data at `spec`, and their scoring.

    spec: None for the data of the protocol, or else the run's own; networks: those of the protocol, by role. Raises
    UserError if data or run do not fit the protocol.
    """
    open_data = partial(pipe.dataset, seed=SEED)
    if protocol is None:
        scoring = pipe.task.scoring(seed=SEED)
        return Plan(scoring.open_cases(open_data, spec, split, num), scoring)
    if protocol.task != pipe.task.name:
        raise UserError(f"The protocol {protocol.name} is for {protocol.task} runs; this is a {pipe.task.name} run.")
    spec = spec or protocol.data
    if spec is None:
        raise UserError(
            f"The protocol {protocol.name} needs its data: give --data with {protocol.layout}. {protocol.title}."
        )
    scoring = pipe.task.scoring(protocol.rules, seed=SEED, networks=networks)
    limit = min(num, protocol.choose) if protocol.choose is not None else num

    def open_by_protocol(split: str, spec: str | None = None, *, limit: int | None = None,
                         options: Mapping[str, str] | None = None) -> Any:  # fmt: skip
        return open_data(split, spec, limit=limit, options={**(options or {}), **protocol.reader})

    return Plan(scoring.open_cases(open_by_protocol, spec, split, limit), scoring)
