"""What a trained model is used for: generate, invert, interpolate, arithmetic. All act on latents.

B batch; latents (C, H, W) or (N, C).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from crossflow.core.batch import Condition
from crossflow.core.errors import UserError, unknown_name
from crossflow.core.guidance import Velocity, autoguidance, indicator_guidance, zero_init
from crossflow.core.model import CrossFlow
from crossflow.core.solvers import solve


def guided_velocity(
    model: CrossFlow,
    *,
    condition: Condition | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    zero_until: float = 0.0,
    weak: CrossFlow | None = None,
) -> Velocity:
    """The model's velocity under guidance by the indicator, or by the `weak` model when one is given.

    zero_until: the velocity is zero before this time.
    """
    encoded = model.encode_condition(condition)
    if weak is not None:
        velocity = autoguidance(
            model, weak, guidance_scale, encoded, weak.encode_condition(condition), guidance_interval
        )
    else:
        velocity = indicator_guidance(model, guidance_scale, encoded, guidance_interval)
    return zero_init(velocity, zero_until) if zero_until > 0 else velocity


@torch.no_grad()
def generate(
    model: CrossFlow,
    z0: Tensor,
    *,
    condition: Condition | None = None,
    solver: str = "euler",
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    zero_init_steps: int = 0,
    time_grid: str = "uniform",
    weak: CrossFlow | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Flows z0 (B, *latent) from t = 0 to 1: z1 (B, *latent). Arguments are those of `solve` and `guided_velocity`."""
    velocity = guided_velocity(
        model,
        condition=condition,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        zero_until=zero_init_steps / max(num_steps, 1),
        weak=weak,
    )
    return solve(velocity, z0, solver=solver, num_steps=num_steps, time_grid=time_grid, on_step=on_step).z


@torch.no_grad()
def invert(
    model: CrossFlow,
    z1: Tensor,
    *,
    condition: Condition | None = None,
    solver: str = "euler",
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Flows z1 (B, *latent) back from t = 1 to 0: z0. To re-generate z1 use a second-order solver or many steps."""
    velocity = guided_velocity(model, condition=condition, guidance_scale=guidance_scale)
    return solve(velocity, z1, solver=solver, num_steps=num_steps, reverse=True, on_step=on_step).z


def interpolate(a: Tensor, b: Tensor, num_frames: int, kind: str = "lerp") -> Tensor:
    """Latents on the way from a to b (*latent each), both ends included: (num_frames, *latent); see `between`."""
    return torch.stack([between(a, b, weight, kind) for weight in frame_weights(num_frames)])


def frame_weights(num_frames: int) -> list[float]:
    """`num_frames` >= 2 weights spaced evenly from 0 to 1."""
    if num_frames < 2:
        raise UserError(f"An interpolation needs at least 2 frames; {num_frames} came.")
    return [index / (num_frames - 1) for index in range(num_frames)]


def between(a: Tensor, b: Tensor, weight: float, kind: str = "lerp") -> Tensor:
    """The latent `weight` in [0, 1] of the way from a to b, each of one shape.

    lerp: (1 - weight) a + weight b. slerp: along the great circle of the flattened latents, their norms interpolated
    linearly (Shoemake 1985).
    """
    if kind == "lerp":
        return (1 - weight) * a + weight * b
    if kind != "slerp":
        raise unknown_name("interpolation", kind, ("lerp", "slerp"))
    norm_a, norm_b = a.norm(), b.norm()
    if norm_a == 0 or norm_b == 0:
        raise UserError("slerp needs two latents that are not zero; use lerp.")
    unit_a, unit_b = a / norm_a, b / norm_b
    angle = torch.acos((unit_a * unit_b).sum().clamp(-1, 1))
    if angle.sin().abs() < 1e-4:  # (nearly) parallel: the great circle is the straight line, or is not unique
        return (1 - weight) * a + weight * b
    direction = (((1 - weight) * angle).sin() * unit_a + (weight * angle).sin() * unit_b) / angle.sin()
    return direction * ((1 - weight) * norm_a + weight * norm_b)


def arithmetic(
    base: Tensor,
    plus: Tensor | None = None,
    minus: Tensor | None = None,
    strength: float = 1.0,
    restandardise: bool = False,
) -> Tensor:
    """base + strength (plus - minus), each (B, *latent); an absent one counts zero (CrossFlow section 4.5).

    restandardise: as the released demo does, subtract the result's mean and divide by its standard deviation, per
    sample over the whole latent. UserError for a result that is the same number everywhere, which has no deviation.
    """
    result = base
    if plus is not None:
        result = result + strength * plus
    if minus is not None:
        result = result - strength * minus
    return standardised(result) if restandardise else result


def standardised(z: Tensor) -> Tensor:
    """z (B, *latent) less its mean, over its standard deviation, each over the whole latent of a sample."""
    flat = z.flatten(1)
    deviation = flat.std(1, keepdim=True)
    if (deviation == 0).any():
        raise UserError(
            "The result of the arithmetic is one and the same number everywhere and cannot be brought to deviation 1: "
            "the inputs cancel each other. Choose another strength, or leave the result as it is."
        )
    return ((flat - flat.mean(1, keepdim=True)) / deviation).reshape(z.shape)
