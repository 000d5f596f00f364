"""Flow maps: closed-form average velocities of a flow between Gaussians satisfy every target, and networks learn them.

Source N(0, 1) and target N(M, S^2), independent: z_t has mean t M and variance (1 - t)^2 + t^2 S^2, the flow keeps the
number of standard deviations, and so z_s = s M + sqrt(var_s / var_t) (z - t M).
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from crossflow.core.backbones import BACKBONES, Backbone, build_backbone
from crossflow.core.backbones.time_reversal import TimeReversal
from crossflow.core.batch import Batch, Jump
from crossflow.core.config import BackboneConfig, Config, IntervalConfig
from crossflow.core.errors import UserError
from crossflow.core.guidance import Guidance
from crossflow.core.interval import AverageOf, Jumps, composed, derivative, draw_jumps, guided_rows
from crossflow.core.model import CrossFlow
from crossflow.core.noise import training_noise
from crossflow.core.objective import Objective
from crossflow.core.paths import PathPoint
from crossflow.core.sampling import count_evaluations, flow, generate, invert
from crossflow.core.settings import build
from crossflow.core.solvers import solve
from crossflow.core.source import SourceEncoder

M, S = 1.5, 0.4


def variance(t: Tensor) -> Tensor:
    return (1 - t).square() + (S * t).square()


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """z (B, 1), t (B,)."""
    t = t[:, None]
    return M + (-(1 - t) + S * S * t) / variance(t) * (z - t * M)


def average(z: Tensor, t: Tensor, s: Tensor) -> list[Tensor]:
    """The exact u; at s = t the velocity."""
    a, b = t[:, None], s[:, None]
    end = b * M + (variance(b) / variance(a)).sqrt() * (z - a * M)
    gap = torch.where(a == b, torch.ones_like(a), b - a)
    return [torch.where(a == b, velocity(z, t), (end - z) / gap)]


def jumps(num: int = 200, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """z, t, s, both ways."""
    g = torch.Generator().manual_seed(0)
    t, s = torch.rand(2, num, generator=g, dtype=dtype)
    return torch.randn(num, 1, generator=g, dtype=dtype) + t[:, None] * M, t, s


def test_the_exact_map_leads_along_the_flow() -> None:
    z, t, _ = jumps()
    fine = solve(lambda z, t: velocity(z, z.new_full((len(z),), t)), z, solver="rk4", steps=200).z
    start = torch.zeros_like(t)
    assert (z + average(z, start, start + 1)[0] - fine).abs().max() < 1e-8


@pytest.mark.parametrize("way", ["difference", pytest.param("jvp", marks=pytest.mark.slow)])
def test_the_derivative_identity_holds_for_the_exact_map(way: str) -> None:
    """u - (s - t) du/dt = v: exactly by forward mode, and up to the square of epsilon by differences."""
    z, t, s = jumps()
    settings = IntervalConfig(derivative=way, epsilon=1e-3)  # type: ignore[arg-type]
    (slope,) = derivative(average, z, velocity(z, t), t, s, settings)
    residual = (average(z, t, s)[0] - (s - t)[:, None] * slope - velocity(z, t)).abs()
    inside = (t > 1e-3) & (t < 1 - 1e-3)
    assert residual[inside].max() < (1e-10 if way == "jvp" else 1e-4)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_the_composition_identity_holds_for_the_exact_map(alpha: float) -> None:
    z, t, s = jumps()
    assert (composed(average, z, t, s, alpha) - average(z, t, s)[0]).abs().max() < 1e-9


def test_a_straight_first_jump_tends_to_the_derivative_target() -> None:
    """alpha-Flow: for alpha -> 0 the residual of the composition is alpha times that of the derivative."""
    z, t, s = jumps()

    def wrong(z: Tensor, t: Tensor, s: Tensor) -> list[Tensor]:
        return [average(z, t, s)[0] + (z * (s - t)[:, None]).sin()]

    v, gap, alpha = velocity(z, t), (s - t)[:, None], 1e-5
    discrete = (composed(wrong, z, t, s, alpha, v) - wrong(z, t, s)[0]) / alpha
    (slope,) = derivative(wrong, z, v, t, s, IntervalConfig(epsilon=1e-4))
    inside = (t > 1e-3) & (t < 1 - 1e-3)
    assert (discrete - (v + gap * slope - wrong(z, t, s)[0]))[inside].abs().max() < 1e-3


def test_times_are_drawn_as_set() -> None:
    noise = training_noise(0, 0, range(4000), (1,))
    assert noise.jump is not None
    settings = IntervalConfig(diagonal=0.25, aligned=0.4, both_ways=0.3, guidance=(1, 8))
    drawn = draw_jumps(noise.time, noise.jump[:, 0], noise.jump[:, 1:], settings)
    length = drawn.s - drawn.t
    assert drawn.is_diagonal.float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(length == 0, drawn.is_diagonal)
    assert (length < 0)[~drawn.is_diagonal].float().mean() == pytest.approx(0.3, abs=0.03)
    steps = length.abs()
    aligned = torch.isin(steps, torch.tensor([1, 0.5, 0.25, 0.125])) & (
        (torch.minimum(drawn.t, drawn.s) / steps) % 1 == 0
    )
    assert aligned[~drawn.is_diagonal].float().mean() == pytest.approx(0.4, abs=0.03)
    for size in (1, 0.5, 0.25, 0.125):
        starts = torch.minimum(drawn.t, drawn.s)[aligned & (steps == size)]
        assert len(starts.unique()) == 1 / size
        assert len(starts) / aligned.sum() == pytest.approx(0.25, abs=0.05)
    assert drawn.scale.min() >= 1
    assert drawn.scale.log().mean() == pytest.approx(torch.tensor(8.0).log().item() / 2, abs=0.03)


# -- networks


class Affine(nn.Module):
    """u = a(t, s) + b(t, s) z, as the exact map of Gaussians is; a and b small networks."""

    jumps, takes_scale = True, False

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, z, t, unconditional, condition=None, jump=None):
        s = t if jump is None else jump.end
        a, b = self.net(torch.stack([t, s], 1)).unbind(1)
        return [a[:, None] + b[:, None] * z]


class Known(nn.Module):
    """The exact velocity of the Gaussians, as a teacher."""

    def forward(self, z, t, unconditional, condition=None):
        return [velocity(z, t)]


def toy(interval: dict, *, teacher: bool = False, **sections: dict) -> Objective:
    """The objective of a map between the Gaussians, from data or from the exact velocity."""
    settings = {"both_ways": 0.5, **interval, **({"teacher": "known"} if teacher else {})}
    config = {
        "task": "toy",
        "source": {"kind": "gaussian"},
        "backbone": {"interval": "added", "time_scale": 1},
        "path": {"sigma_min": 0},
        "time": {"law": "uniform"},
        "guidance": {"drop": 0},
        "loss": {"encoder": "none"},
        "interval": settings,
    }
    torch.manual_seed(0)
    source = SourceEncoder(None, "gaussian", (1,))
    objective = Objective(CrossFlow(source, Affine()), build(Config, config | sections))
    if teacher:
        objective.teach(CrossFlow(source, Known()))
    return objective


def train(objective: Objective, num_steps: int) -> CrossFlow:
    optimizer = torch.optim.Adam(objective.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(num_steps):
        target = M + S * torch.randn(128, 1, generator=generator)
        objective(Batch(features=target, target=target), training_noise(0, step, range(128), (1,)))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return objective.model


@pytest.mark.slow
@pytest.mark.parametrize(("target", "teacher"), [("derivative", False), ("composition", True)])
def test_a_network_learns_the_exact_map(target: str, teacher: bool) -> None:
    """In 1, 2 and 4 jumps, backwards too; a single Euler step of its velocity gives the mean of the target instead."""
    model = train(toy({"target": target}, teacher=teacher), 350)
    z0 = torch.linspace(-2, 2, 9)[:, None]
    exact = M + S * z0
    for steps in (1, 2, 4):
        z1 = generate(model, z0, solver="map", steps=steps)
        assert (z1 - exact).abs().mean() < 0.1, steps
        assert (invert(model, z1, solver="map", steps=steps) - z0).abs().mean() < 0.45, steps
    assert (generate(model, z0, solver="euler", steps=50) - exact).abs().mean() < 0.1
    mean = generate(model, z0, solver="euler", steps=1)
    assert (mean - M).abs().mean() < 0.25
    assert (mean - exact).abs().mean() > 0.3


def test_one_euler_step_is_the_posterior_mean() -> None:
    """The velocity that minimises the flow loss at t = 0 is E[z1 | z0] - z0, here by least squares on a discrete z0."""
    g = torch.Generator().manual_seed(0)
    source = torch.tensor([-1.0, 0.0, 2.0]).repeat(200)[:, None]
    target = source.sin() + torch.randn(600, 1, generator=g) * (1 + source.abs())
    rows = [source.squeeze() == value for value in source.unique()]
    best = {value.item(): (target - source)[row].mean() for value, row in zip(source.unique(), rows, strict=True)}

    def flow_velocity(z: Tensor, t: float) -> Tensor:
        return torch.stack([best[value] for value in z.squeeze().tolist()])[:, None]

    end = solve(flow_velocity, source, steps=1).z
    for row in rows:
        assert (end[row] - target[row].mean()).abs().max() < 1e-5
        # No other constant has a smaller squared error to the targets of this source.
        error = (target[row] - end[row]).square().mean()
        assert all((target[row] - end[row] - shift).square().mean() > error for shift in (-0.05, 0.05))


@pytest.mark.parametrize("settings", [{"name": "dit", "time_scale": 1.0}, {"name": "dimr", "size": "tiny"}])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("interval", ["added", "split"])
def test_a_map_starts_with_the_velocities_of_the_trained_network(
    perturb: Callable, settings: dict, guided: bool, interval: str
) -> None:
    """Exactly where s = t; a jump then differs for split, which reads s, and trained embeddings make it differ."""
    config = BackboneConfig.model_validate({"width": 32, "depth": 3, "heads": 2, **settings})
    plain = perturb(build_backbone(config, (2, 8, 8))).eval()
    network = build_backbone(config.model_copy(update={"interval": interval, "guided": guided}), (2, 8, 8)).eval()
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert bool(missing) == (interval == "added" or guided)
    assert all("jump" in name for name in missing)
    z, t, flags = torch.randn(4, 2, 8, 8), torch.rand(4), torch.tensor([True, False, False, True])
    here, there = Jump(t, torch.ones(4)), Jump(t.flip(0), torch.full((4,), 3.0))
    before = plain(z, t, flags)
    for jump in (None, here):
        for old, new in zip(before, network(z, t, flags, None, jump), strict=True):
            assert torch.equal(old, new)
    moved = network(z, t, flags, None, there)[-1]
    assert torch.equal(moved, before[-1]) == (interval == "added")
    perturb(network)
    if guided or interval == "added":
        assert not torch.equal(network(z, t, flags, None, there)[-1], network(z, t, flags, None, here)[-1])


def test_where_the_times_agree_the_loss_is_that_of_the_flow(tiny_dit: Callable) -> None:
    """Bit for bit; with jumps it is another, whose gradient to the source comes from the diagonal alone."""
    noise, size = training_noise(0, 0, range(8), (2, 4, 4)), (2, 4, 4)
    batch = Batch(features=torch.randn(8, 3), target=torch.randn(8, *size))

    weights = tiny_dit(size).state_dict()

    def loss(**interval: object) -> tuple[Tensor, Tensor]:
        settings = {"target": "composition", **interval} if interval else {}
        backbone = {"interval": "added"} if interval else {}
        network = tiny_dit(size, **backbone)
        network.load_state_dict(weights, strict=False)
        if interval:
            network.jump.start_at_zero()
        model = CrossFlow(SourceEncoder(None, "gaussian", size), network)
        config = {"task": "toy", "source": {"kind": "gaussian"}, "loss": {"encoder": "none"}, "guidance": {"drop": 0}}
        objective = Objective(model, build(Config, config | {"interval": settings, "backbone": backbone}))
        z0 = noise.source.clone().requires_grad_()
        certain = replace(batch, unconditional=torch.zeros(8, dtype=torch.bool))
        value = objective._flow_losses(certain, z0, noise)["flow"]
        return value, torch.autograd.grad(value, z0)[0]

    plain, gradient = loss()
    same, _ = loss(diagonal=1.0)
    other, other_gradient = loss(diagonal=0.5)
    assert noise.jump is not None
    is_diagonal = noise.jump[:, 1] < 0.5
    assert (other_gradient.flatten(1).abs().amax(1) > 0).tolist() == is_diagonal.tolist()
    assert gradient.flatten(1).abs().amax(1).min() > 0
    assert torch.equal(same, plain)
    assert other != same


@pytest.mark.parametrize("teacher", [False, True])
def test_guidance_is_built_in_for_conditional_samples_alone(teacher: bool) -> None:
    """The goal where s = t: v_u + w (v - v_u), of data by its fixed point; nothing is added without a source."""
    guidance = {"guidance": (3.0, 3.0), "guidance_interval": (0.0, 0.5), "diagonal": 1.0}
    objective = toy({"target": "derivative", **guidance}, teacher=teacher, guidance={"drop": 0.5})

    def shifted(z, t, unconditional, condition=None, jump=None):
        return [velocity(z, t) + 0.7 * ~unconditional[:, None]]

    for model in (objective.model, objective.teacher if teacher else objective.model):
        model.backbone.forward = shifted  # type: ignore[method-assign]
    t = torch.tensor([0.2, 0.2, 0.9])
    flags, w = torch.tensor([False, True, False]), torch.tensor([3.0, 1.0, 3.0])
    z = torch.randn(3, 1)
    batch = Batch(features=z, target=z)
    point = PathPoint(t, z, velocity(z, t) + 0.7 * ~flags[:, None])
    acts = guided_rows(Jumps(t, t, w, flags), flags, (0.0, 0.5))
    assert acts.tolist() == [True, False, False]
    goal = objective._velocity_goal(batch, point, AverageOf(objective.model, flags, w), acts)
    factor = 3.0 if teacher else 1 + (1 - 1 / 3)
    expected = velocity(z, t) + torch.tensor([[factor * 0.7], [0.0], [0.7]])
    assert torch.allclose(goal, expected, atol=1e-6)


def test_sampling_by_jumps_counts_its_evaluations_and_names_what_it_cannot_do(tiny_dit: Callable) -> None:
    size = (2, 4, 4)
    source = SourceEncoder(None, "gaussian", size)
    map_model = CrossFlow(source, tiny_dit(size, interval="added"))
    scaled = CrossFlow(source, tiny_dit(size, interval="split", guided=True))
    z = torch.randn(3, *size)
    assert count_evaluations(solver="map", steps=4, guidance=3.0) == 4
    assert flow(scaled, z, Guidance(3.0), solver="map", steps=4).evaluations == (4, 4, 4)
    assert not torch.equal(*(generate(scaled, z, solver="map", steps=2, guidance=w) for w in (1.0, 3.0)))
    for model, guidance, message in (
        (CrossFlow(source, tiny_dit(size)), Guidance(), "needs a flow map"),
        (map_model, Guidance(3.0), "built in"),
        (map_model, Guidance(interval=(0.0, 0.5)), "interval.guidance_interval"),
        (map_model, Guidance(zero_until=0.1), "zero_init"),
    ):
        with pytest.raises(UserError, match=message):
            flow(model, z, guidance, solver="map", steps=2)


def test_a_reversed_map_jumps_the_other_way(tiny_dit: Callable) -> None:
    """Captions from a text-to-image map: its jumps backwards, read forwards."""
    size = (2, 4, 4)
    model = CrossFlow(SourceEncoder(None, "gaussian", size), tiny_dit(size, interval="split"))
    reversed_model = CrossFlow(model.source_encoder, TimeReversal(model.backbone))
    z = torch.randn(3, *size)
    backwards = invert(model, z, solver="map", steps=4)
    assert torch.allclose(generate(reversed_model, z, solver="map", steps=4), backwards, atol=1e-6)
    assert not torch.allclose(backwards, invert(model, z, solver="map", steps=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": {"target": "derivative"}}, "backbone.interval = none do not fit"),
        ({"backbone": {"interval": "added"}}, "interval.target = none"),
        ({"interval": {"target": "reflow"}}, "needs interval.teacher"),
        (
            {"interval": {"target": "reflow", "teacher": "run", "guidance": [1, 8]}, "backbone": {"guided": True}},
            "single",
        ),
        ({"interval": {"guidance": [1, 8]}}, "takes the guidance scale"),
        ({"interval": {"guidance": [8, 1]}}, "ascending"),
        ({"interval": {"guidance": [0.5, 1]}}, "start at 1"),
        (
            {"interval": {"target": "composition", "guidance": [3, 3]}, "backbone": {"interval": "split"}}
            | {"guidance": {"drop": 0}},
            "needs the unconditional velocity",
        ),
        (
            {"interval": {"target": "derivative"}, "backbone": {"interval": "added", "time_scale": 1000}},
            "time_scale = 1000, where derivatives are mostly noise",
        ),
    ],
)
def test_settings_that_do_not_fit_are_explained(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Config, {"task": "toy", **settings})


def test_a_backbone_without_jumps_makes_no_flow_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES._entries, "plain", Backbone(lambda config, shape, **options: Known(), {}))
    with pytest.raises(UserError, match="the backbone plain knows no jumps"):
        build_backbone(BackboneConfig(name="plain", interval="added"), (1,))
