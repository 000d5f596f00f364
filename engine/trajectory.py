"""How an output comes about: samples of its source, and the states of the flow on the way to it.

P pieces of an input: 1, or the number of tiles of a large picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from crossflow.core.batch import Source
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.progress import Progress
from crossflow.core.solvers import END, SOLVERS, TIME_GRIDS
from crossflow.engine.inputs import item_ids, read_inputs
from crossflow.engine.latents import encode
from crossflow.engine.outputs import Outputs
from crossflow.engine.sample import Pipeline


@dataclass(frozen=True)
class Trajectory:
    """States of one flow, decoded."""

    times: tuple[float, ...]
    """In [0, 1], ascending; the first is 0."""
    states: Outputs
    """z at each time; the last one is the output."""
    ends: Outputs
    """Where the flow leads from each state on a straight line: z + (1 - t) v, v of the step that follows."""


@torch.no_grad()
def trajectory(
    pipe: Pipeline,
    value: object,
    num_states: int = 8,
    *,
    seed: int = 0,
    output_type: str = "pil",
    on_step: Progress | None = None,
    **settings: object,
) -> Trajectory:
    """The flow whose end is `pipe(value, seed=seed, **settings)`.

    num_states: states shown, at least 2 and spread evenly over the steps; fewer where the solver makes fewer steps. The
    other arguments are those of `Pipeline`. Raises UserError as `Pipeline` does.

        path = trajectory(pipe, "a red cube", 5)
        path.states[0].save("source.png"), path.states[-1].save("cube.png")
    """
    if num_states < 2:
        raise UserError(f"Expected at least 2 states of a trajectory, got {num_states}.")
    chosen = pipe.sample_settings(**settings)
    encoded = encode(pipe, value, seed=seed, mode=chosen.mode)
    shown = sorted({round(k * chosen.steps / (num_states - 1)) for k in range(num_states)})
    groups = [slice(first, first + chosen.batch_size) for first in range(0, len(encoded.z0), chosen.batch_size)]
    states, ends = zip(
        *(_path(pipe, encoded.source[rows], encoded.z0[rows], chosen, shown, on_step) for rows in groups), strict=True
    )
    times = _times(chosen)

    def outputs(parts: Sequence[Sequence[Tensor]]) -> Outputs:
        latents = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        raw = [encoded.pieces.join(pipe.decode(z, encoded.source.features)) for z in latents]
        return Outputs(tuple(raw), pipe.task.pictures, seed, output_type=output_type)

    return Trajectory(tuple(times[index] for index in shown), outputs(states), outputs(ends))


def _path(
    pipe: Pipeline, source: Source, z0: Tensor, settings: SampleConfig, shown: Sequence[int], on_step: Progress | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The states with the numbers in `shown`, and the ends to which the flow leads from them, each (P, *latent)."""
    path = pipe.solve(source, z0, settings, on_step, keep_trajectory=True).trajectory
    times = _times(settings)
    ends = [
        path[k] + (1 - times[k]) / (times[k + 1] - times[k]) * (path[k + 1] - path[k])
        if k < settings.steps
        else path[k]
        for k in shown
    ]
    return [path[k] for k in shown], ends


def _times(settings: SampleConfig) -> list[float]:
    """The times of the steps + 1 states of a solution."""
    if SOLVERS.get(settings.solver).adaptive:
        return [END * step / settings.steps for step in range(settings.steps + 1)]
    return list(accumulate(TIME_GRIDS[settings.time_grid](settings.steps).lengths, initial=0.0))


def source_samples(
    pipe: Pipeline, value: object, num: int = 4, *, seed: int = 0, output_type: str = "pil"
) -> tuple[Outputs, Outputs]:
    """The mean of the source posterior and `num` samples of it, decoded; those samples are where the outputs of
    `pipe(value, num=num, seed=seed)` begin.

    A model that starts from Gaussian noise has no mean of a source; there the first outputs are empty.

        means, samples = source_samples(pipe, "a red cube", 3)
    """
    (read,) = read_inputs([value], pipe.task.input_kind)
    ids = item_ids([read], num)
    modes = [] if pipe.model.source_encoder.kind == "gaussian" else [True]

    def decoded(mode: bool, id: str) -> object:
        encoded = encode(pipe, read, seed=seed, mode=mode, id=id)
        return encoded.pieces.join(pipe.decode(encoded.z0, encoded.source.features))

    means, samples = [decoded(mode, ids[0]) for mode in modes], [decoded(False, id) for id in ids]
    return (
        Outputs(tuple(means), pipe.task.pictures, seed, output_type=output_type),
        Outputs(tuple(samples), pipe.task.pictures, seed, tuple(ids), output_type),
    )
