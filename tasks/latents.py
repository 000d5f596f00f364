"""The latent tools on a pipeline, for any task: interpolation, arithmetic, inversion (CrossFlow section 4.5)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossflow.core import sampling
from crossflow.core.batch import Source
from crossflow.core.errors import UserError
from crossflow.tasks.pipeline import Pipeline

SHARED = "shared"
"""All inputs of a latent tool take the noise of this id, so that latents differ by their meaning alone."""


def encode(pipe: Pipeline, value: Any, *, seed: int = 0, mode: bool = False) -> tuple[Source, Tensor]:
    """The source of one input and its z0 (1, *latent)."""
    source = pipe.task.source([pipe.task.fit(pipe.task.read_input(value))])
    return source, pipe.latents(source, [SHARED], seed, mode)


def _encode_all(pipe: Pipeline, values: Sequence[Any], seed: int, mode: bool) -> list[Tensor]:
    if pipe.model.source_encoder.kind == "gaussian":
        raise UserError(
            "This model starts from Gaussian noise (source.kind = gaussian), so its "
            "source latents carry no meaning to interpolate "
            "or to add. Use a run with a variational, deterministic or noisy source."
        )
    latents = [encode(pipe, value, seed=seed, mode=mode)[1] for value in values]
    shapes = {tuple(z.shape) for z in latents}
    if len(shapes) > 1:
        raise UserError(f"The inputs give latents of different shapes, {sorted(shapes)}; give inputs of one size.")
    return latents


def _generate(pipe: Pipeline, z0: Tensor, settings: dict[str, Any]) -> list[Any]:
    chosen = pipe.sample_settings(**settings)
    none = Source(features=z0)
    parts = [pipe.generate(none, part, chosen) for part in z0.split(chosen.batch_size)]
    return pipe.task.decode(torch.cat(parts).float().cpu())


def interpolate(
    pipe: Pipeline,
    a: Any,
    b: Any,
    num_frames: int = 9,
    *,
    kind: str = "lerp",
    seed: int = 0,
    mode: bool = False,
    **settings: Any,
) -> list[Any]:
    """Outputs for `num_frames` source latents on the way from input a to input b, both included."""
    z_a, z_b = _encode_all(pipe, [a, b], seed, mode)
    return _generate(pipe, sampling.interpolate(z_a[0], z_b[0], num_frames, kind), settings)


def arithmetic(
    pipe: Pipeline,
    base: Any,
    *,
    plus: Any = None,
    minus: Any = None,
    strengths: Sequence[float] = (1.0,),
    restandardise: bool = False,
    seed: int = 0,
    mode: bool = False,
    **settings: Any,
) -> list[Any]:
    """Outputs for base + k (plus - minus), one for each strength k; an absent term counts zero."""
    if plus is None and minus is None:
        raise UserError("Latent arithmetic needs something to add or to subtract: give plus, minus, or both.")
    given = [value for value in (base, plus, minus) if value is not None]
    latents = iter(_encode_all(pipe, given, seed, mode))
    z, z_plus, z_minus = (next(latents) if value is not None else None for value in (base, plus, minus))
    assert z is not None
    results = [sampling.arithmetic(z, z_plus, z_minus, strength, restandardise) for strength in strengths]
    return _generate(pipe, torch.cat(results), settings)


def invert(
    pipe: Pipeline,
    value: str | Path | np.ndarray,
    *,
    source: Any = None,
    solver: str = "heun",
    steps: int = 50,
    seed: int = 0,
) -> tuple[Tensor, Any, float]:
    """Flows a finished output (a picture, a caption, a depth map) back to its source latent and forward again.

    source: the input it belongs to, needed by baselines that have a condition. Returns z0 (1, *latent), the
    re-generated output and the root mean squared error of the re-generated latent.
    """
    z1 = pipe.task.target(value).to(pipe.device)
    condition = None
    if pipe.model.source_encoder.kind == "gaussian":
        if source is None:
            raise UserError(
                "This model starts from noise under a condition; say which input the "
                "output belongs to (source; --source on the command line)."
            )
        condition = encode(pipe, source, seed=seed)[0].to(pipe.device).condition
    z0 = sampling.invert(pipe.model, z1, condition=condition, solver=solver, num_steps=steps)
    again = sampling.generate(pipe.model, z0, condition=condition, solver=solver, num_steps=steps)
    error = (again - z1).square().mean().sqrt().item()
    return z0.cpu(), pipe.task.decode(again.float().cpu())[0], error
