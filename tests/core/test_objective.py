"""Objective: the sum of its parts, gradients to every parameter, targets and indicators as the path sees them."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from crossflow.core import losses
from crossflow.core.batch import Batch, Condition
from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.model import CrossFlow
from crossflow.core.noise import Noise, training_noise
from crossflow.core.objective import Objective
from crossflow.core.settings import build
from crossflow.core.source import Posterior, SourceEncoder

GRID, TOKENS, B = (2, 4, 4), (5, 3), 6


class Trunk(nn.Module):
    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        self.out = nn.Linear(7, 2 * math.prod(latent_shape))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(features).unflatten(1, (2, *self.latent_shape))


class ConditionEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 6)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        return self.out(features)


class Reconstructor(nn.Module):
    def __init__(self, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.out = nn.Linear(math.prod(latent_shape), 9)

    def forward(self, z0: Tensor) -> Tensor:
        return self.out(z0.flatten(1))


@pytest.fixture
def make(tiny_dit: Callable, perturb: Callable) -> Callable[..., Objective]:
    """make(latent_shape, kind, encoder, ...): a perturbed objective around a tiny DiT."""

    def objective(
        latent_shape: tuple[int, ...] = GRID,
        kind: str = "variational",
        encoder: str = "contrastive",
        *,
        context: bool = False,
        grid: bool = False,
        settings: dict | None = None,
        extra_losses: Callable | None = None,
        decoded_loss: nn.Module | None = None,
    ) -> Objective:
        torch.manual_seed(0)
        config = {"task": "toy", "source": {"kind": kind}, "loss": {"encoder": encoder}, **(settings or {})}
        model = CrossFlow(
            SourceEncoder(None if kind == "gaussian" else Trunk(latent_shape), kind, latent_shape),  # type: ignore[arg-type]
            tiny_dit(latent_shape, context_dim=6 if context else None, grid_channels=1 if grid else 0),
            ConditionEncoder() if context else None,
        )
        with_head = Objective(
            model,
            build(Config, config),
            alignment_head=nn.Linear(9, math.prod(latent_shape)),
            reconstructor=Reconstructor(latent_shape),
            extra_losses=extra_losses,
            decoded_loss=decoded_loss,
        )
        perturb(with_head, 1)
        return with_head

    return objective


def batch(latent_shape: tuple[int, ...] = GRID, context: bool = False, grid: bool = False) -> Batch:
    g = torch.Generator().manual_seed(2)
    condition = None
    if context or grid:
        condition = Condition(
            torch.randn(B, 4, 4, generator=g) if context else None,
            torch.ones(B, 4, dtype=torch.bool) if context else None,
            torch.randn(B, 1, *latent_shape[1:], generator=g) if grid else None,
        )
    return Batch(
        features=torch.randn(B, 7, generator=g),
        target=torch.randn(B, *latent_shape, generator=g),
        alignment=torch.randn(B, 9, generator=g),
        condition=condition,
    )


def noise(latent_shape: tuple[int, ...] = GRID, drop: tuple[float, ...] = (0.01, 0.9, 0.02, 0.9, 0.9, 0.03)) -> Noise:
    """By default samples 0, 2 and 5 are unconditional."""
    return replace(training_noise(0, 0, range(B), latent_shape), drop=torch.tensor(drop))


@pytest.mark.parametrize("latent_shape", [GRID, TOKENS])
@pytest.mark.parametrize("encoder", ["none", "contrastive", "sigmoid", "reconstruction"])
@pytest.mark.parametrize("kind", ["variational", "deterministic", "noisy"])
def test_gradient_reaches_every_parameter_of_crossflow(
    make: Callable[..., Objective], kind: str, encoder: str, latent_shape: tuple[int, ...]
) -> None:
    objective = make(latent_shape, kind, encoder)
    objective(batch(latent_shape), noise(latent_shape))["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("latent_shape", "context", "grid"),
    [(GRID, True, False), (GRID, False, True), (GRID, True, True), (TOKENS, True, False)],
)
def test_gradient_reaches_every_parameter_of_the_baselines(
    make: Callable[..., Objective], latent_shape: tuple[int, ...], context: bool, grid: bool
) -> None:
    objective = make(latent_shape, "gaussian", context=context, grid=grid)
    objective(batch(latent_shape, context, grid), noise(latent_shape))["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["variational", "gaussian"])
def test_loss_is_the_weighted_sum_of_its_parts(make: Callable[..., Objective], kind: str) -> None:
    def extra(batch: Batch, posterior: Posterior, z0: Tensor) -> dict[str, Tensor]:
        return {"text": posterior.mean.square().mean() + 2}

    weights = {"loss": {"kl_weight": 0.03, "encoder_weight": 0.7}}
    parts = make(kind=kind, context=True, settings=weights, extra_losses=extra)(batch(context=True), noise())
    assert {name for name in parts if parts[name].ndim != 0} == set()
    if kind == "gaussian":
        assert set(parts) == {"loss", "flow", "text"}
        expected = parts["flow"] + parts["text"]
    else:
        assert set(parts) == {"loss", "flow", "kl", "encoder", "text"}
        expected = parts["flow"] + 0.03 * parts["kl"] + 0.7 * parts["encoder"] + parts["text"]
    assert torch.allclose(parts["loss"], expected)


def test_only_a_variational_source_is_regularised(make: Callable[..., Objective]) -> None:
    for kind in ("deterministic", "noisy"):
        assert set(make(kind=kind, encoder="none")(batch(), noise())) == {"loss", "flow"}


@torch.no_grad()
def test_parts_are_those_of_the_functions_of_tensors(make: Callable[..., Objective]) -> None:
    objective, b, n = make(settings={"time": {"law": "uniform"}, "loss": {"kl": "released"}}), batch(), noise()
    parts = objective(b, n)
    posterior = objective.model.source_encoder(b.features)
    z0, t = posterior.mean + (posterior.log_var / 2).exp() * n.source, n.time.reshape(-1, 1, 1, 1)
    target = b.target[torch.tensor([5, 1, 0, 3, 4, 2])]  # 0, 2, 5 rotated
    z_t, velocity = t * target + (1 - (1 - 1e-5) * t) * z0, target - (1 - 1e-5) * z0
    unconditional = torch.tensor([True, False, True, False, False, True])
    predicted = objective.model.velocity(z_t, n.time, unconditional)
    assert parts["flow"].item() == pytest.approx((predicted - velocity).square().mean().item(), rel=1e-5)
    assert parts["kl"].item() == pytest.approx(posterior.kl("released").mean().item(), rel=1e-6)
    aligned = objective.alignment_head(b.alignment)  # type: ignore[misc]
    expected = losses.clip_contrastive_loss(z0, aligned, objective.log_temperature)
    assert parts["encoder"].item() == pytest.approx(expected.item(), rel=1e-5)


def losses_of(objective: Objective, b: Batch, n: Noise) -> dict[str, Tensor]:
    """What the backbone was given in one forward."""
    inputs: dict[str, Tensor] = {}

    def keep(_: nn.Module, arguments: tuple) -> None:
        inputs.update(zip(("z_t", "t", "unconditional"), arguments, strict=False))

    handle = objective.model.backbone.register_forward_pre_hook(keep)
    objective(b, n)
    handle.remove()
    return inputs


def at_the_end(n: Noise) -> Noise:
    return replace(n, time=torch.full((B,), 1 - 2**-24))


@torch.no_grad()
def test_unconditional_samples_of_crossflow_flow_to_rotated_targets(make: Callable[..., Objective]) -> None:
    objective, b = make(settings={"time": {"law": "uniform"}}), batch()
    inputs = losses_of(objective, b, at_the_end(noise()))  # at t = 1 z_t is the target
    assert inputs["unconditional"].tolist() == [True, False, True, False, False, True]
    assert torch.allclose(inputs["z_t"], b.target[torch.tensor([5, 1, 0, 3, 4, 2])], atol=1e-3)


@torch.no_grad()
def test_a_single_drawn_sample_stays_conditional_and_keeps_its_target(make: Callable[..., Objective]) -> None:
    objective, b = make(settings={"time": {"law": "uniform"}}), batch()
    inputs = losses_of(objective, b, at_the_end(noise(drop=(0.9, 0.01, 0.9, 0.9, 0.9, 0.9))))
    assert not inputs["unconditional"].any()
    assert torch.allclose(inputs["z_t"], b.target, atol=1e-3)


@torch.no_grad()
def test_baselines_keep_their_targets_and_may_drop_a_single_condition(make: Callable[..., Objective]) -> None:
    objective, b = make(kind="gaussian", context=True, settings={"time": {"law": "uniform"}}), batch(context=True)
    inputs = losses_of(objective, b, at_the_end(noise()))
    assert inputs["unconditional"].tolist() == [True, False, True, False, False, True]
    assert torch.allclose(inputs["z_t"], b.target, atol=1e-3)
    alone = losses_of(objective, b, noise(drop=(0.9, 0.01, 0.9, 0.9, 0.9, 0.9)))
    assert alone["unconditional"].tolist() == [False, True, False, False, False, False]


@torch.no_grad()
def test_missing_target_values_do_not_count_and_weights_rotate_along(make: Callable[..., Objective]) -> None:
    objective, b = make(encoder="none"), batch()
    weight = torch.ones(B, 1, 4, 4)
    weight[0] = 0
    weight[3] = 0
    n = noise()
    whole = objective(replace(b, weight=weight), n)["flow"]
    # the unconditional sample 2 takes target and weight of sample 0, so samples 2 and 3 count nothing
    inputs: list[Tensor] = []
    handle = objective.model.backbone.register_forward_hook(lambda _, arguments, output: inputs.append(output[0]))
    objective(b, n)
    handle.remove()
    posterior = objective.model.source_encoder(b.features)
    target = b.target[torch.tensor([5, 1, 0, 3, 4, 2])]
    errors = (inputs[0] - (target - (1 - 1e-5) * posterior.sample(noise=n.source))).square().flatten(1).mean(1)
    assert whole.item() == pytest.approx((errors[[0, 1, 4, 5]].sum() / B).item(), rel=1e-5)


@torch.no_grad()
def test_time_law_and_shift_of_the_configuration_are_used(make: Callable[..., Objective]) -> None:
    n = replace(noise(), time=torch.full((B,), 0.5))
    objective = make(settings={"time": {"law": "logit_normal", "mean": math.log(3), "shift": 2.0}})
    assert torch.allclose(losses_of(objective, batch(), n)["t"], torch.full((B,), 1.5 / 1.75))


@torch.no_grad()
def test_the_same_noise_gives_the_same_loss(make: Callable[..., Objective]) -> None:
    objective = make()
    first, second = objective(batch(), noise()), objective(batch(), noise())
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_losses_are_float32_and_near_the_exact_ones_under_autocast(make: Callable[..., Objective]) -> None:
    objective = make()
    exact = objective(batch(), noise())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective(batch(), noise())
    for name, value in half.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(exact[name].item(), rel=0.03), name


def test_learned_parts_of_losses_are_separate_from_the_generator(make: Callable[..., Objective]) -> None:
    generator = {name for name, _ in make().model.named_parameters()}
    for encoder, own in (
        ("none", set()),
        ("contrastive", {"alignment_head.weight", "alignment_head.bias", "log_temperature"}),
        ("sigmoid", {"alignment_head.weight", "alignment_head.bias", "log_temperature", "bias"}),
        ("reconstruction", {"reconstructor.out.weight", "reconstructor.out.bias"}),
    ):
        names = {name for name, _ in make(encoder=encoder).named_parameters()}
        assert names == {f"model.{name}" for name in generator} | own
    assert make(kind="gaussian", context=True).alignment_head is None


def test_temperature_starts_as_configured(tiny_dit: Callable) -> None:
    config = build(Config, {"task": "toy", "loss": {"temperature": 0.05}})
    model = CrossFlow(SourceEncoder(Trunk(GRID), "variational", GRID), tiny_dit(GRID))
    assert Objective(model, config, alignment_head=nn.Linear(9, 32)).log_temperature.exp().item() == pytest.approx(20)


SOURCE_GRADIENTS = {
    "diagonal": lambda k, t: k * (1 - t) + 1,
    "everywhere": lambda k, t: k * (1 - t) + 1,
    "target_detached": lambda k, t: k * (1 - t),
    "start": lambda k, t: (k + 1) * (t == 0),
    "none": lambda k, t: 0 * t,
}
"""d(k z_t - (z1 - z0)) / d z0 by each rule, for a velocity network v(z, t) = k z on z_t = (1 - t) z0 + t z1."""


@pytest.mark.parametrize("rule", SOURCE_GRADIENTS)
def test_the_encoder_gets_the_gradient_of_its_rule(make: Callable[..., Objective], rule: str) -> None:
    settings = {
        "loss": {"encoder": "none", "encoder_gradient": rule, "mean_weight": float(rule == "none")},
        "time": {"law": "uniform", "at_start": 0.5},
        "path": {"sigma_min": 0},
        "guidance": {"drop": 0},
    }
    objective, b, k = make(kind="deterministic", settings=settings), batch(), nn.Parameter(torch.tensor(0.7))
    objective.model.backbone.forward = lambda z, *_: [k * z]  # type: ignore[method-assign]
    z0, t = torch.randn(B, *GRID, requires_grad=True), torch.tensor([0.0, 0.0, 0.0, 0.2, 0.5, 0.9])
    objective.model.source_encoder.forward = lambda *_: Posterior(z0)  # type: ignore[method-assign]
    parts = objective(b, replace(noise(), time=torch.where(t == 0, t, 0.5 + t / 2)))
    parts["flow"].backward()
    times = t.view(-1, 1, 1, 1)
    z_t = (1 - times) * z0 + times * b.target
    residual = (k * z_t - (b.target - z0)).detach()
    expected = 2 * residual * SOURCE_GRADIENTS[rule](k.detach(), times) / z0.numel()
    torch.testing.assert_close(torch.zeros_like(z0) if z0.grad is None else z0.grad, expected, atol=1e-6, rtol=1e-4)
    # The network learns alike under all of them.
    torch.testing.assert_close(k.grad, (2 * residual * z_t.detach()).mean())


def test_the_mean_learns_the_target_and_its_direction_from_its_own_samples_alone(
    make: Callable[..., Objective],
) -> None:
    loss = {"encoder": "none", "kl_weight": 0.0, "encoder_gradient": "none", "mean_weight": 2.0, "direction_weight": 3}
    objective, b, n = make(settings={"loss": loss}), batch(), noise()
    parts = objective(b, n)
    mean = objective.model.source_encoder(b.features).mean
    own = [1, 3, 4]  # 0, 2 and 5 have the targets of others
    squares = (mean - b.target).square().flatten(1).mean(1)[own].sum() / B
    turned = losses.direction_loss(mean, b.target)[own].sum() / B
    assert parts["mean"].item() == pytest.approx(squares.item(), rel=1e-5)
    assert parts["direction"].item() == pytest.approx(turned.item(), rel=1e-5)
    torch.testing.assert_close(parts["loss"], parts["flow"] + 2 * parts["mean"] + 3 * parts["direction"])
    (2 * squares + 3 * turned).backward()
    weight = objective.model.source_encoder.trunk.out.weight  # type: ignore[union-attr]
    expected, weight.grad = weight.grad.clone(), None
    parts["loss"].backward()
    torch.testing.assert_close(weight.grad, expected)


class Distance(nn.Module):
    """Of decoded end points from the targets, mean squared."""

    def forward(self, z1: Tensor, batch: Batch) -> Tensor:
        return (z1 - batch.target).square().flatten(1).mean(1)


@pytest.mark.parametrize("path", ["linear", "sincos"])
def test_a_decoded_loss_alone_trains_the_network_by_the_end_of_one_step(
    make: Callable[..., Objective], path: str
) -> None:
    loss = {"encoder": "none", "kl_weight": 0.0, "flow_weight": 0.0, "decoded": "l1", "decoded_weight": 2.0}
    settings = {"path": {"name": path, "sigma_min": 0}, "time": {"at_start": 1.0}, "loss": loss}
    objective, b, n = make(kind="deterministic", settings=settings, decoded_loss=Distance()), batch(), noise()
    parts = objective(b, n)
    z0 = objective.model.source_encoder(b.features).mean
    flags = torch.tensor([True, False, True, False, False, True])
    velocity = objective.model.velocity(z0, torch.zeros(B), flags)
    end = z0 + velocity if path == "linear" else 2 / math.pi * velocity
    expected = (end - b.target).square().flatten(1).mean(1)[~flags].sum() / B
    torch.testing.assert_close(parts["decoded"], expected)
    torch.testing.assert_close(parts["loss"], 2 * expected)
    parts["loss"].backward()
    assert all(parameter.grad is not None for parameter in objective.model.backbone.parameters())
    assert not objective.leaves_parameters_out


@torch.no_grad()
def test_a_bridge_takes_the_noise_that_a_deterministic_source_leaves(make: Callable[..., Objective]) -> None:
    plain, noisy = (
        make(kind="deterministic", settings={"path": {"noise": sigma}, "time": {"law": "uniform"}})
        for sigma in (0.0, 0.5)
    )
    n = noise()
    difference = losses_of(noisy, batch(), n)["z_t"] - losses_of(plain, batch(), n)["z_t"]
    t = n.time.view(-1, 1, 1, 1)
    torch.testing.assert_close(difference, 0.5 * (t * (1 - t)).sqrt() * n.source, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoder", ["contrastive", "sigmoid"])
def test_temperature_has_a_gradient_at_its_bound_and_returns_from_it(
    make: Callable[..., Objective], encoder: str
) -> None:
    objective = make(encoder=encoder)
    with torch.no_grad():
        objective.log_temperature.fill_(math.log(200))
    objective(batch(), noise())["loss"].backward()
    assert objective.log_temperature.item() == pytest.approx(math.log(100), rel=1e-6), "the parameter itself is clamped"
    assert objective.log_temperature.grad.item() > 0, "the pairs of this batch match badly: smaller is better"
    torch.optim.SGD([objective.log_temperature], lr=0.1).step()
    objective(batch(), noise())
    assert objective.log_temperature.exp().item() < 99


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"encoder": "contrastive"}, "needs an alignment head"),
        ({"encoder": "reconstruction"}, "needs a decoder"),
        ({"encoder": "none", "kl": "standrd"}, "Unknown KL form 'standrd'. Did you mean 'standard'"),
        ({"encoder": "none", "encoder_gradient": "none"}, "leaves the source encoder to its own losses"),
        ({"encoder": "none", "flow_weight": 0}, "trains the source encoder alone"),
        ({"encoder": "none", "decoded": "l1"}, "loss.decoded = l1 is no loss of this task"),
    ],
)
def test_invalid_objectives_are_user_errors(tiny_dit: Callable, loss: dict, message: str) -> None:
    model = CrossFlow(SourceEncoder(Trunk(GRID), "variational", GRID), tiny_dit(GRID))
    with pytest.raises(UserError, match=message):
        Objective(model, build(Config, {"task": "toy", "loss": loss}))


@pytest.mark.parametrize("coefficients", [(), (0.5, 2.0)])
def test_several_velocities_make_the_multi_resolution_loss(
    make: Callable[..., Objective], coefficients: tuple[float, ...]
) -> None:
    objective = make(settings={"loss": {"encoder": "none", "coefficients": coefficients}, "guidance": {"drop": 0}})
    b, n = batch(), noise()
    silent = [torch.zeros(B, 2, 2, 2), torch.zeros(B, *GRID)]
    objective.model.backbone.forward = lambda *_: silent  # type: ignore[method-assign]
    velocity = b.target - (1 - 1e-5) * objective.model.source_encoder(b.features).sample(noise=n.source)
    coarse = (2 * torch.nn.functional.avg_pool2d(velocity, 2)).square().mean()
    first, last = coefficients or (0.25, 1.0)
    torch.testing.assert_close(objective(b, n)["flow"], first * coarse + last * velocity.square().mean())


def test_each_velocity_needs_a_coefficient(make: Callable[..., Objective]) -> None:
    objective = make(settings={"loss": {"encoder": "none", "coefficients": [0.25, 1.0]}})
    with pytest.raises(UserError, match=r"loss\.coefficients has 2 values, but the backbone returns 1 velocities"):
        objective(batch(), noise())


def test_regulariser_is_averaged_or_summed_over_the_batch(make: Callable[..., Objective]) -> None:
    mean = make(settings={"loss": {"encoder": "none", "kl": "released"}})
    total = make(settings={"loss": {"encoder": "none", "kl": "released", "kl_reduction": "sum"}})
    parts, summed = mean(batch(), noise()), total(batch(), noise())
    torch.testing.assert_close(summed["kl"], B * parts["kl"])
    torch.testing.assert_close(summed["loss"] - summed["flow"], B * (parts["loss"] - parts["flow"]))


def test_without_the_flow_loss_the_source_encoder_alone_is_trained(make: Callable[..., Objective]) -> None:
    objective = make(settings={"loss": {"encoder": "contrastive", "flow_weight": 0}})
    parts = objective(batch(), noise())
    assert set(parts) == {"loss", "kl", "encoder"}
    parts["loss"].backward()
    reached = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in objective.named_parameters() if ".backbone." not in name} == reached
    with pytest.raises(UserError, match="flow_weight=0"):
        make(encoder="none", settings={"loss": {"encoder": "none", "flow_weight": 0}})


def test_the_flow_loss_is_weighted(make: Callable[..., Objective]) -> None:
    parts = make(settings={"loss": {"encoder": "none", "kl_weight": 0, "flow_weight": 0.5}})(batch(), noise())
    assert parts["loss"].item() == pytest.approx(parts["flow"].item() / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": {"encoder_gradient": "start"}}, "set time.at_start"),
        ({"path": {"noise": 0.1}}, "set source.kind=deterministic"),
        ({"loss": {"decoded": "features"}}, "name the network by which features are compared"),
        ({"source": {"kind": "gaussian"}, "loss": {"mean_weight": 1}}, "which source.kind = gaussian lacks"),
    ],
)
def test_settings_of_the_source_that_do_not_fit_are_user_errors(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Config, {"task": "toy", **settings})
