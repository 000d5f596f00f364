"""The latent tools on a pipeline, for any task: interpolation, arithmetic, inversion (CrossFlow section 4.5).

Sources differ by their meaning alone when all of them take the same noise, which is what the tools do unless told
otherwise. P pieces of an input: 1, or the tiles of a large picture.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossflow.core import sampling
from crossflow.core.batch import Source
from crossflow.core.config import SampleConfig
from crossflow.core.errors import UserError
from crossflow.core.solvers import SOLVERS
from crossflow.data.resize import center_crop_resize
from crossflow.engine.sample import OnStep, Pipeline
from crossflow.tasks.base import Pieces

SHARED = "shared"
"""The id whose noise all inputs of a latent tool take."""


@dataclass(frozen=True)
class Encoded:
    """An input with its source latents z0 (P, *latent)."""

    pieces: Pieces
    source: Source
    z0: Tensor


@torch.no_grad()
def encode(pipe: Pipeline, value: Any, *, seed: int = 0, mode: bool = False, noise: str = SHARED) -> Encoded:
    """One input (a prompt; a picture or its path) as source latents.

    mode: the means of the posteriors instead of samples; noise: the id whose noise samples take.
    """
    return _encode(pipe, pipe.task.pieces(pipe.task.read_input(value)), seed, mode, noise)


def _encode(pipe: Pipeline, pieces: Pieces, seed: int, mode: bool, noise: str) -> Encoded:
    source = pipe.task.source(pieces.values)
    return Encoded(pieces, source, pipe.latents(source, _names(noise, len(pieces.values)), seed, mode))


def _names(noise: str, num_pieces: int) -> list[str]:
    return [noise] if num_pieces == 1 else [f"{noise}#{index}" for index in range(num_pieces)]


def _encode_all(
    pipe: Pipeline, values: dict[str, Any], settings: SampleConfig, seed: int, shared_noise: bool
) -> dict[str, Encoded]:
    """The inputs, by the part they play, for latents to be mixed: those of other sizes are cropped and resized to the
    first one's.
    """
    if pipe.model.source_encoder.kind == "gaussian":
        raise UserError(
            "This model starts from Gaussian noise (source.kind = gaussian), so its source latents carry no meaning to "
            "interpolate or to add. Use a run with a variational, deterministic or noisy source."
        )
    read = [pipe.task.read_input(value) for value in values.values()]
    cut = [pipe.task.pieces(value) for value in read]
    fitted = [
        pieces if pieces.layout == cut[0].layout else pipe.task.pieces(center_crop_resize(value, read[0].shape[:2]))
        for pieces, value in zip(cut, read, strict=True)
    ]
    return {
        part: _encode(pipe, pieces, seed, settings.mode, SHARED if shared_noise else part)
        for part, pieces in zip(values, fitted, strict=True)
    }


def _outputs(
    pipe: Pipeline,
    latents: Iterable[Tensor],
    features: Sequence[Tensor],
    pieces: Pieces,
    settings: SampleConfig,
    on_step: OnStep | None,
) -> list[Any]:
    """An output for each of the latents (P, *latent), which are made as they are needed, and of the features (P, ...)
    that a task decodes them with.
    """
    num = len(features)
    num_pieces = len(pieces.values)
    together = max(1, settings.batch_size // num_pieces)  # outputs whose pieces make a batch
    steps = _counted(math.ceil(num / together) * math.ceil(num_pieces / settings.batch_size), settings, on_step)
    outputs: list[Any] = []
    waiting = iter(latents)
    while group := list(islice(waiting, together)):
        parts = torch.cat(group).split(settings.batch_size)
        z1 = [pipe.generate(Source(features=part), part, settings, next(steps)) for part in parts]
        its = torch.cat(list(features[len(outputs) : len(outputs) + len(group)]))
        decoded = pipe.task.decode_with(torch.cat(z1).float().cpu(), its)
        outputs += [pieces.join(decoded[i : i + num_pieces]) for i in range(0, len(decoded), num_pieces)]
    next(steps, None)  # the last one is over
    return outputs


def _counted(num_runs: int, settings: SampleConfig, on_step: OnStep | None) -> Iterator[OnStep]:
    """For each of `num_runs` integrations what its solver is to call; `on_step` hears of the steps of all of them."""
    # An adaptive solver says nothing on the way: there an integration is a step.
    steps = 1 if SOLVERS.get(settings.solver).adaptive else settings.steps
    hear = on_step or (lambda done, total: None)
    for run in range(num_runs):

        def step(done: int, total: int, before: int = run * steps) -> None:
            hear(before + done, num_runs * steps)

        yield step
        hear((run + 1) * steps, num_runs * steps)


def interpolate(
    pipe: Pipeline,
    a: Any,
    b: Any,
    num_frames: int = 9,
    *,
    kind: str = "lerp",
    seed: int = 0,
    shared_noise: bool = True,
    on_step: OnStep | None = None,
    **settings: Any,
) -> list[Any]:
    """Outputs for `num_frames` source latents on the way from input a to input b, both included. A picture b of another
    size than a is cropped and resized to that of a.

    kind: lerp | slerp; features that guide a decoder (FlowTiTok) go along a straight line. shared_noise: both ends take
    the same noise, else each its own. settings: fields of `SampleConfig`; `mode` goes from mean to mean. on_step(done,
    total) counts solver steps.
    """
    chosen = pipe.sample_settings(**settings)
    weights = sampling.frame_weights(num_frames)
    first, last = _encode_all(pipe, {"from": a, "to": b}, chosen, seed, shared_noise).values()
    frames = (sampling.between(first.z0, last.z0, weight, kind) for weight in weights)
    features = [first.source.features] * num_frames
    if pipe.task.decodes_features:
        features = [torch.lerp(first.source.features, last.source.features, weight) for weight in weights]
    return _outputs(pipe, frames, features, first.pieces, chosen, on_step)


def arithmetic(
    pipe: Pipeline,
    base: Any,
    *,
    plus: Any = None,
    minus: Any = None,
    strengths: Sequence[float] = (1.0,),
    restandardise: bool = False,
    seed: int = 0,
    shared_noise: bool = True,
    on_step: OnStep | None = None,
    **settings: Any,
) -> list[Any]:
    """Outputs for base + k (plus - minus), one for each strength k; an absent term counts zero. Pictures of other sizes
    than the base are cropped and resized to that of the base.

    restandardise: bring each result to mean 0 and deviation 1 over its whole latent, as the released demo does (with
    strength 1). The other arguments are those of `interpolate`.
    """
    given = {part: value for part, value in (("base", base), ("plus", plus), ("minus", minus)) if value is not None}
    if len(given) < 2:
        raise UserError("Latent arithmetic needs something to add or to subtract: give plus, minus, or both.")
    chosen = pipe.sample_settings(**settings)
    encoded = _encode_all(pipe, given, chosen, seed, shared_noise)
    # All pieces are one sample: its mean and deviation are those of the whole picture.
    terms = [encoded[part].z0[None] if part in encoded else None for part in ("base", "plus", "minus")]
    assert terms[0] is not None
    results = (sampling.arithmetic(terms[0], terms[1], terms[2], k, restandardise)[0] for k in strengths)
    features = [encoded["base"].source.features] * len(strengths)
    return _outputs(pipe, results, features, encoded["base"].pieces, chosen, on_step)


def invert(
    pipe: Pipeline,
    value: str | Path | np.ndarray,
    *,
    source: Any = None,
    solver: str = "heun",
    steps: int = 50,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Any, float]:
    """Flows a finished output (a picture, a caption, a depth map) back to its source latent and forward again.

    source: the input it belongs to, needed by baselines that have a condition, and used by decoders that are guided
    by it (FlowTiTok; else they decode under an empty text). on_step(done, total) counts solver
    steps. Returns z0 (P, *latent), the re-generated output and the root mean squared error of the re-generated latent.
    """
    chosen = pipe.sample_settings(solver=solver, steps=steps)
    pieces = pipe.task.target(value)
    z1 = torch.stack(list(pieces.values))
    given, features = Source(z1), None
    if source is not None and pipe.task.decodes_features:
        features = encode(pipe, source, seed=seed).source.features.expand(len(z1), -1, -1)
    if pipe.model.source_encoder.kind == "gaussian":
        if source is None:
            raise UserError(
                "This model starts from noise under a condition; say which input the "
                "output belongs to (source; --source on the command line)."
            )
        its = encode(pipe, source, seed=seed)
        if its.pieces.layout != pieces.layout:
            ours, theirs = (" x ".join(map(str, one.layout)) for one in (pieces, its.pieces))
            raise UserError(f"The output is {ours} to the model, what it makes of this source {theirs}: not a pair.")
        given = replace(given, condition=its.source.condition)
    step = _counted(2 * math.ceil(len(z1) / chosen.batch_size), chosen, on_step)
    z0, again = [], []
    for start in range(0, len(z1), chosen.batch_size):
        part = given[start : start + chosen.batch_size].to(pipe.device)
        options: dict[str, Any] = {"condition": part.condition, "solver": solver, "steps": steps}
        z0.append(sampling.invert(pipe.model, part.features, on_step=next(step), **options))
        again.append(sampling.generate(pipe.model, z0[-1], on_step=next(step), **options).float().cpu())
    next(step, None)  # the last one is over
    whole = torch.cat(again)
    error = (whole - z1).square().mean().sqrt().item()
    decoded = pipe.task.decode(whole) if features is None else pipe.task.decode_with(whole, features)
    return torch.cat(z0).cpu(), pieces.join(decoded), error
