"""The latent tools on a pipeline, for any task: interpolation, arithmetic, inversion (CrossFlow section 4.5).

By default all inputs of a tool share the noise of the first one, so that they differ in meaning alone and the first one
gives the output of `pipe(input)`. P pieces of an input: 1, or the number of tiles of a large picture.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from crossflow.core.progress import Progress
from crossflow.core.solvers import SOLVERS
from crossflow.data.resize import center_crop_resize
from crossflow.engine.inputs import item_ids, read_inputs
from crossflow.engine.outputs import Outputs
from crossflow.engine.sample import Pipeline
from crossflow.tasks.base import Pieces


@dataclass(frozen=True)
class Encoded:
    """An input with its source latents z0 (P, *latent)."""

    pieces: Pieces
    source: Source
    z0: Tensor


@dataclass(frozen=True)
class Inversion:
    """An output flowed back to its source latent, and forward again."""

    z0: Tensor
    """The source latent (P, *latent)."""
    outputs: Outputs
    """The inverted output, decoded from its latent, and the one re-generated from z0."""
    error: float
    """Root mean squared error of the re-generated latent."""


@torch.no_grad()
def encode(pipe: Pipeline, value: object, *, seed: int = 0, mode: bool = False, id: str | None = None) -> Encoded:
    """The source latents from which `pipe(value, seed=seed)` starts; value: a prompt, a picture or its path.

    mode: means of the posteriors instead of samples; id: key of the noise, by default that of `inputs.item_ids`.
    """
    (read,) = read_inputs([value], pipe.task.input_kind)
    pieces = pipe.task.pieces(read)
    return _encode(pipe, pieces, seed, mode, item_ids([read])[0] if id is None else id)


def _encode(pipe: Pipeline, pieces: Pieces, seed: int, mode: bool, id: str) -> Encoded:
    source = pipe.source(pieces.values)
    return Encoded(pieces, source, pipe.latents(source, pieces.names(id), seed, mode))


@torch.no_grad()
def _encode_all(
    pipe: Pipeline, values: Mapping[str, object], seed: int, *, means: Sequence[str], shared_noise: bool
) -> dict[str, Encoded]:
    """The encoded inputs by name. Pictures of other sizes are cropped and resized to the size of the first one.

    means: names of the inputs that enter by the mean of their posterior.
    """
    source = pipe.task.config.source
    if source.kind == "gaussian":
        raise UserError(
            "This model starts from Gaussian noise (source.kind = gaussian), so its source latents carry no meaning to "
            "interpolate or to add. Use a run with a variational, deterministic or noisy source."
        )
    if source.condition:
        raise UserError(
            "The backbone of this model reads its input besides the source latent (source.condition = true), and there "
            "is no input between two others. Use a run with source.condition=false."
        )
    read = read_inputs(list(values.values()), pipe.task.input_kind)
    ids = item_ids(read)
    fitted = [pipe.task.pieces(value) for value in read]
    for index, value in enumerate(read):
        if fitted[index].layout != fitted[0].layout:
            assert isinstance(value, np.ndarray), "only pictures differ in layout"
            assert isinstance(read[0], np.ndarray)
            fitted[index] = pipe.task.pieces(center_crop_resize(value, read[0].shape[:2]))
    return {
        part: _encode(pipe, pieces, seed, part in means, ids[0] if shared_noise else id)
        for part, pieces, id in zip(values, fitted, ids, strict=True)
    }


def _outputs(
    pipe: Pipeline,
    latents: Iterable[Tensor],
    features: Sequence[Tensor],
    pieces: Pieces,
    settings: SampleConfig,
    on_step: Progress | None,
) -> list[Any]:
    """One output for each latent (P, *latent), decoded with the features (P, ...) of its source. The latents are drawn
    from the iterable batch by batch.
    """
    num = len(features)
    num_pieces = len(pieces.values)
    group_size = max(1, settings.batch_size // num_pieces)  # outputs whose pieces fill a batch
    steps = _counted(math.ceil(num / group_size) * math.ceil(num_pieces / settings.batch_size), settings, on_step)
    outputs: list[Any] = []
    pending = iter(latents)
    while group := list(islice(pending, group_size)):
        parts = torch.cat(group).split(settings.batch_size)
        z1 = [pipe.generate(Source(features=part), part, settings, next(steps)) for part in parts]
        guides = torch.cat(list(features[len(outputs) : len(outputs) + len(group)]))
        decoded = pipe.decode(torch.cat(z1), guides)
        outputs += [pieces.join(decoded[i : i + num_pieces]) for i in range(0, len(decoded), num_pieces)]
    next(steps, None)  # reports the end of the last integration
    return outputs


def _counted(num_runs: int, settings: SampleConfig, on_step: Progress | None) -> Iterator[Progress]:
    """A callback for each of `num_runs` integrations; `on_step` receives the steps of all of them together."""
    # An adaptive solver reports no steps: there an integration counts as one.
    steps = 1 if SOLVERS.get(settings.solver).adaptive else settings.steps
    report = on_step or (lambda done, total: None)
    for run in range(num_runs):

        def step(done: int, total: int, before: int = run * steps) -> None:
            report(before + done, num_runs * steps)

        yield step
        report((run + 1) * steps, num_runs * steps)


def interpolate(
    pipe: Pipeline,
    a: object,
    b: object,
    num_frames: int = 9,
    *,
    kind: str = "lerp",
    seed: int = 0,
    shared_noise: bool = True,
    output_type: str = "pil",
    on_step: Progress | None = None,
    **settings: object,
) -> Outputs:
    """Outputs for `num_frames` source latents between the inputs a and b, both ends included.

    Args:
        a, b: as for `Pipeline`. A picture b of another size is cropped and resized to the size of a.
        num_frames: at least 2.
        kind: lerp | slerp. Features that guide a decoder (FlowTiTok) are always interpolated linearly.
        shared_noise: both ends take the noise of a; otherwise each takes its own.
        settings: fields of `SampleConfig`; with `mode` both ends are posterior means.

    Raises UserError for a model that starts from noise, and for invalid settings.

        frames = interpolate(pipe, "a red cube", "a blue sphere", 5, kind="slerp", seed=1)
        frames[2].save("half.png")
    """
    chosen = pipe.sample_settings(**settings)
    weights = sampling.frame_weights(num_frames)
    ends = {"a": a, "b": b}
    encoded = _encode_all(pipe, ends, seed, means=tuple(ends) if chosen.mode else (), shared_noise=shared_noise)
    first, last = encoded.values()
    frames = (sampling.between(first.z0, last.z0, weight, kind) for weight in weights)
    features = [first.source.features] * num_frames
    if pipe.task.decodes_features:
        features = [torch.lerp(first.source.features, last.source.features, weight) for weight in weights]
    outputs = _outputs(pipe, frames, features, first.pieces, chosen, on_step)
    return Outputs(tuple(outputs), pipe.task.pictures, seed, output_type=output_type)


def arithmetic(
    pipe: Pipeline,
    base: object,
    *,
    plus: object = None,
    minus: object = None,
    strengths: Sequence[float] = (1.0,),
    restandardise: bool = False,
    seed: int = 0,
    shared_noise: bool = True,
    output_type: str = "pil",
    on_step: Progress | None = None,
    **settings: object,
) -> Outputs:
    """Outputs for base + k (plus - minus), one for each strength k; an absent term counts as zero.

    The result carries noise once: that of plus and minus cancels, and a term without its counterpart enters by its
    mean. Pictures of other sizes are cropped and resized to the size of the base.

    Args:
        strengths: k; 0 gives the base itself.
        restandardise: bring each result to mean 0 and deviation 1 over its whole latent, as the released demo does
            (with strength 1).
        shared_noise: plus and minus take the noise of the base; otherwise each takes its own, which does not cancel.

    The other arguments are those of `interpolate`. Raises UserError without a term, and for terms that cancel.

        base, half, whole = arithmetic(pipe, "a red cube", plus="blue", minus="red", strengths=[0, 0.5, 1])
    """
    values = {part: value for part, value in (("base", base), ("plus", plus), ("minus", minus)) if value is not None}
    if len(values) < 2:
        raise UserError("Latent arithmetic needs something to add or to subtract: give plus, minus, or both.")
    chosen = pipe.sample_settings(**settings)
    single = tuple(values)[1:] if len(values) == 2 else ()
    encoded = _encode_all(pipe, values, seed, means=tuple(values) if chosen.mode else single, shared_noise=shared_noise)
    # All pieces are one sample: its mean and deviation are those of the whole picture.
    terms = [encoded[part].z0[None] if part in encoded else None for part in ("base", "plus", "minus")]
    assert terms[0] is not None
    results = (sampling.arithmetic(terms[0], terms[1], terms[2], k, restandardise)[0] for k in strengths)
    features = [encoded["base"].source.features] * len(strengths)
    outputs = _outputs(pipe, results, features, encoded["base"].pieces, chosen, on_step)
    return Outputs(tuple(outputs), pipe.task.pictures, seed, output_type=output_type)


def invert(
    pipe: Pipeline,
    value: str | Path | np.ndarray,
    *,
    source: object = None,
    solver: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    output_type: str = "pil",
    on_step: Progress | None = None,
) -> Inversion:
    """Flows a finished output (a picture, a caption, a depth map) back to its source latent, and forward again.

    Args:
        source: the input of the output. Models that also read it as a condition require it; decoders guided by
            features (FlowTiTok) use it, and decode under an empty text without it.
        solver, steps: see `inversion_settings`.
        on_step: called with (done, total) solver steps.

    Raises UserError for a value that is not an output of the task, and for a missing or unsuitable source.

        inversion = invert(pipe, "cube.png")
        inversion.z0.std(), inversion.error
    """
    chosen = inversion_settings(pipe, solver, steps)
    pieces = pipe.task.target(value)
    z1 = torch.stack(list(pieces.values)).float()
    start, features = Source(z1), None
    if source is not None and pipe.task.decodes_features:
        features = encode(pipe, source, seed=seed).source.features.expand(len(z1), -1, -1)
    if pipe.task.config.source.conditions:
        start = replace(start, condition=_condition(pipe, source, pieces, seed))
    step = _counted(2 * math.ceil(len(z1) / chosen.batch_size), chosen, on_step)
    z0, again = [], []
    for first in range(0, len(z1), chosen.batch_size):
        part = start[first : first + chosen.batch_size].to(pipe.device)
        z0.append(pipe.invert(part, part.features, chosen, next(step)))
        again.append(pipe.generate(part, z0[-1], chosen, next(step)))
    next(step, None)  # reports the end of the last integration
    whole = torch.cat(again)
    error = (whole - z1).square().mean().sqrt().item()
    outputs = []
    for latents in (z1, whole):
        decoded = pipe.decode(latents, features)
        outputs.append(pieces.join(decoded))
    return Inversion(
        torch.cat(z0).cpu(), Outputs(tuple(outputs), pipe.task.pictures, seed, output_type=output_type), error
    )


def edit(
    pipe: Pipeline,
    value: str | Path | np.ndarray,
    *,
    plus: object = None,
    minus: object = None,
    strengths: Sequence[float] = (1.0,),
    seed: int = 0,
    output_type: str = "pil",
    on_step: Progress | None = None,
    **settings: object,
) -> Outputs:
    """Edits a finished output: flows it back to its source latent, adds k (plus - minus) for each strength k, and flows
    forward again; k = 0 gives the output re-generated from its own latent.

    Args:
        value: a finished output, as for `invert`.
        plus, minus: inputs of the task, as for `arithmetic`; at least one of them.
        settings: solver and steps, see `inversion_settings`.

    Raises UserError for a model that starts from noise, without a term, and for terms whose latents have another shape.

        same, blue = edit(pipe, "cube.png", plus="a blue cube", minus="a red cube", strengths=[0, 1])
    """
    terms = {part: term for part, term in (("plus", plus), ("minus", minus)) if term is not None}
    if not terms:
        raise UserError("An edit needs something to add or to subtract: give plus, minus, or both.")
    means = tuple(terms) if len(terms) == 1 else ()
    encoded = _encode_all(pipe, terms, seed, means=means, shared_noise=True)
    inversion = invert(pipe, value, seed=seed, on_step=on_step, **settings)  # type: ignore[arg-type]
    z0 = inversion.z0.to(pipe.device)
    if wrong := [each for each in encoded.values() if each.z0.shape != z0.shape]:
        raise UserError(
            f"The latent of this output has the shape {tuple(z0.shape)}, that of the term {tuple(wrong[0].z0.shape)}: "
            "give terms of the size that the output's own input has."
        )
    added, subtracted = (encoded[part].z0[None] if part in encoded else None for part in ("plus", "minus"))
    results = (sampling.arithmetic(z0[None], added, subtracted, k)[0] for k in strengths)
    features = [next(iter(encoded.values())).source.features] * len(strengths)
    chosen = inversion_settings(pipe, **settings)  # type: ignore[arg-type]
    outputs = _outputs(pipe, results, features, pipe.task.target(value), chosen, on_step)
    return Outputs(tuple(outputs), pipe.task.pictures, seed, output_type=output_type)


def inversion_settings(pipe: Pipeline, solver: str | None = None, steps: int | None = None) -> SampleConfig:
    """How an output is flowed back: by default with the run's own steps where it is a flow map that jumps both ways,
    else with 50 steps of Heun.

    Raises UserError for the solver map on a run that does not jump backwards.
    """
    jumps_back = pipe.model.jumps and pipe.task.config.interval.both_ways > 0
    solver = solver or ("map" if jumps_back else "heun")
    if SOLVERS.get(solver).jumps and not jumps_back:
        raise UserError(
            "The solver map inverts flow maps that were trained in both directions, and this run was not. Use "
            "--solver heun, or distil with interval.both_ways=0.25."
        )
    own = pipe.settings.steps if SOLVERS.get(solver).jumps and pipe.settings.solver == solver else 50
    plain = {"guidance": 1.0, "zero_init": 0, "time_grid": "uniform"}  # the flow that can be followed backwards
    return pipe.sample_settings(solver=solver, steps=steps or own, **plain)


def _condition(pipe: Pipeline, source: object, pieces: Pieces, seed: int) -> Any:
    """The condition under which the pieces were generated."""
    if source is None:
        raise UserError(
            "The backbone of this model reads its input as a condition: name the input that the output belongs to "
            "(source; --source on the command line)."
        )
    encoded = encode(pipe, source, seed=seed)
    if encoded.pieces.layout != pieces.layout:
        actual, expected = (" x ".join(map(str, each.layout)) for each in (pieces, encoded.pieces))
        raise UserError(
            f"The output and its source do not fit: the model sees the output as {actual}, but one of this source "
            f"would be {expected}."
        )
    return encoded.source.condition
