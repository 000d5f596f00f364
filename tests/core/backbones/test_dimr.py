"""DiMR: resolutions of its velocities, time-dependent norms, skips and features, sizes."""

import pytest
import torch

from crossflow.core.backbones import build_backbone
from crossflow.core.backbones.dimr import SIZES, TimeParameter, TransformerStage, default_stages
from crossflow.core.batch import Condition
from crossflow.core.config import BackboneConfig
from crossflow.core.errors import UserError
from crossflow.core.losses import multi_resolution_loss, stage_coefficients
from crossflow.core.training.optim import decay_groups
from crossflow.core.weights import shapes_only

LATENT = (4, 16, 16)


def tiny(latent_shape=LATENT, context_dim=None, grid_channels=0, **settings):
    torch.manual_seed(0)
    config = BackboneConfig.model_validate({"name": "dimr", "width": 16, "depth": 3, "heads": 2, **settings})
    return build_backbone(config, latent_shape, context_dim=context_dim, grid_channels=grid_channels).eval()


def inputs(batch=3, latent_shape=LATENT):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch, *latent_shape, generator=generator)
    return z, torch.linspace(0, 1, batch), torch.arange(batch) % 2 == 0


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_velocities_come_coarse_to_fine(num_stages):
    velocities = tiny(num_stages=num_stages)(*inputs())
    sides = [16 // 2**i for i in reversed(range(num_stages))]
    assert [tuple(velocity.shape) for velocity in velocities] == [(3, 4, side, side) for side in sides]


@pytest.mark.parametrize("baseline", [{}, {"context_dim": 8}, {"grid_channels": 2}])
def test_gradient_reaches_every_parameter(baseline):
    model, (z, t, flags) = tiny(num_stages=3, **baseline), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    condition = None
    if baseline:
        condition = Condition(
            tokens=torch.randn(3, 5, 8) if "context_dim" in baseline else None,
            grid=torch.randn(3, 2, 16, 16) if "grid_channels" in baseline else None,
        )
    velocities = model(z, t, flags, condition)
    multi_resolution_loss(velocities, torch.randn(3, *LATENT), stage_coefficients(3)).mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not [name for name, parameter in model.named_parameters() if parameter.grad.abs().max() == 0]


def test_a_fresh_model_moves_the_time_dependence_from_the_first_step():
    model, (z, t, flags) = tiny(), inputs()
    sum(velocity.square().mean() for velocity in model(z, t, flags)).backward()
    moving = [parameter for name, parameter in model.named_parameters() if "nodecay" in name]
    assert moving
    assert all(parameter.grad.abs().max() > 0 for parameter in moving)


def test_time_parameter_goes_from_one_value_to_the_other():
    parameter = TimeParameter(1, 0.0)
    with torch.no_grad():
        parameter.param0.fill_(3.0)
        parameter.param1.fill_(1.0)
        parameter.nodecay_weight.fill_(0.5)
        parameter.nodecay_bias.fill_(0.25)
    c = torch.tensor([1.0, -1.0])  # t = 0 and t = 1
    expected = 1 + 2 * torch.sigmoid(1.5 * c + 0.25)
    torch.testing.assert_close(parameter(c)[:, 0], expected)


def test_time_dependence_has_no_weight_decay():
    model = tiny()
    groups = decay_groups(model, 0.1)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in undecayed]
    assert [name for name, _ in model.named_parameters() if "nodecay" in name or "positions" in name] == [
        name for name in names if "nodecay" in name or "positions" in name
    ]
    assert not [name for name in names if name.endswith("gate.weight")]


def test_indicator_reaches_every_resolution():
    model, (z, t, _) = tiny(num_stages=3), inputs()
    conditional = model(z, t, torch.zeros(3, dtype=torch.bool))
    unconditional = model(z, t, torch.ones(3, dtype=torch.bool))
    mixed = model(z, t, torch.tensor([True, False, True]))
    for v_cond, v_uncond, v_mixed in zip(conditional, unconditional, mixed, strict=True):
        assert (v_cond - v_uncond).abs().amax((1, 2, 3)).min() > 1e-5
        torch.testing.assert_close(v_mixed[1], v_cond[1])
        torch.testing.assert_close(v_mixed[::2], v_uncond[::2])


def test_indicator_starts_at_plus_and_minus_one():
    stage = tiny().stages[0]
    assert isinstance(stage, TransformerStage)
    assert (stage.unconditional.tolist(), stage.conditional.tolist()) == ([-1.0], [1.0])


def test_samples_of_a_batch_do_not_influence_each_other():
    model, (z, t, flags) = tiny(num_stages=3), inputs()
    whole = model(z, t, flags)
    alone = model(z[1:2], t[1:2], flags[1:2])
    torch.testing.assert_close(whole[-1][1:2], alone[-1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_equal_velocities_and_gradients(dropout):
    model = tiny(num_stages=3, context_dim=8, dropout=dropout).train()
    condition = Condition(tokens=torch.randn(3, 5, 8))
    results = []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        torch.manual_seed(0)
        velocities = model(*inputs(), condition)
        sum(velocity.square().mean() for velocity in velocities).backward()
        results.append([*velocities, *(parameter.grad.clone() for parameter in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_blocks_of_the_second_half_read_the_outputs_of_the_first_in_reverse_order():
    stage = tiny(depth=5).stages[0]
    inputs_of_skips = []
    for skip in stage.skips:
        skip.register_forward_pre_hook(lambda _, arguments: inputs_of_skips.append(arguments[0]))
    x, c = torch.randn(2, 7, 16), torch.zeros(2)
    outputs = stage.through(x, stage.blocks, c, None, None)
    assert len(outputs) == 5
    for read, skip in zip(inputs_of_skips, (outputs[1], outputs[0]), strict=True):
        assert torch.equal(read[..., 16:], skip)


def test_a_stage_reads_the_full_resolution_latent():
    model, (z, t, flags) = tiny(), inputs()
    z.requires_grad_(True)
    coarse = model(z, t, flags)[0]
    coarse[:, :, 0, 0].sum().backward()
    assert (z.grad.abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_number_of_blocks_is_odd(depth):
    assert [len(stage.blocks) for stage in tiny(depth=depth).stages] == [2 * (depth // 2) + 1, 2 * (depth // 4) + 1]


@pytest.mark.slow
def test_sizes_have_the_papers_parameter_counts():
    with shapes_only():
        counts = {
            (size, stages): sum(parameter.numel() for parameter in _sized(size, stages).parameters())
            for size, stages in [*((size, 2) for size in SIZES), ("XL", 3)]
        }
    assert counts[("XL", 2)] == 950_778_890
    assert counts[("XL", 3)] == 985_439_246
    assert counts[("S", 2)] == pytest.approx(70e6, rel=0.02)
    assert counts[("S", 2)] < counts[("M", 2)] < counts[("B", 2)] < counts[("L", 2)] < counts[("XL", 2)]
    assert {size for size, _ in counts} == set(SIZES)


def _sized(size, num_stages):
    side = 2 ** (num_stages - 1) * 16
    return build_backbone(BackboneConfig(name="dimr", size=size, num_stages=num_stages), (4, side, side))


def test_stages_can_be_configured_individually():
    stages = [
        {"width": 16, "hidden": 24, "depth": 3, "heads": 2, "patch": 2, "pool": 2},
        {"width": 8, "hidden": 40, "depth": 1},
    ]
    velocities = tiny(stages=stages)(*inputs())
    assert [velocity.shape[-1] for velocity in velocities] == [4, 16]
    assert [stage.width for stage in default_stages(BackboneConfig(name="dimr", width=64, heads=2, num_stages=3))] == [
        *(64, 32, 16)
    ]


def test_grain_is_the_multiple_that_sides_of_a_latent_need():
    assert BackboneConfig(name="dit", patch=4).grain == 4
    assert BackboneConfig(name="dimr", patch=1, num_stages=3).grain == 4
    assert BackboneConfig(name="dimr", patch=3, num_stages=2).grain == 6
    stages = [{"width": 16, "hidden": 16, "depth": 1, "patch": 2, "pool": 4}]
    assert BackboneConfig.model_validate({"name": "dimr", "patch": 1, "stages": stages}).grain == 8


def test_latents_of_other_sizes_stretch_the_positions():
    model = tiny(num_stages=3)
    for shape in ((4, 8, 12), (4, 32, 16)):
        assert model(*inputs(latent_shape=shape))[-1].shape == (3, *shape)
    with torch.no_grad():
        for stage in model.stages:
            stage.positions.copy_(torch.arange(len(stage.positions))[:, None] // stage.grid[1])  # the row
    (rows,) = {tuple(column.tolist()) for column in model.stages[0]._positions(8, 2)[..., 0].T}
    assert list(rows) == sorted(rows)
    assert (rows[0], rows[-1]) == (0, 3)
    with pytest.raises(UserError, match="shrinks its input 4 times, which does not divide a latent of 18 x 16"):
        model(*inputs(latent_shape=(4, 18, 16)))


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({}, (77, 16), "works on grids"),
        ({"size": "huge"}, LATENT, "Unknown DiMR size 'huge'"),
        ({"width": 24, "heads": 5}, LATENT, "multiple of backbone.heads"),
        ({"num_stages": 3}, (4, 18, 18), "shrinks its input 4 times"),
        ({"stages": [{"width": 16, "hidden": 16, "depth": 1, "patch": 2}]}, LATENT, "and the last must be 1"),
        ({"stages": [{"width": 16, "hidden": 16, "depth": 1, "heads": 3}]}, LATENT, "not a multiple of its 3 heads"),
    ],
)
def test_invalid_shapes_are_user_errors(settings, shape, message):
    with pytest.raises(UserError, match=message):
        tiny(shape, **settings)


def test_norms_read_time_as_one_minus_twice_t():
    model, (z, t, flags) = tiny(), inputs()
    times = []
    for stage in model.stages:
        stage.norm.register_forward_pre_hook(lambda _, arguments: times.append(arguments[1]))
    model(z, t, flags)
    assert [c.tolist() for c in times] == [[1.0, 0.0, -1.0]] * 2  # t is 0, 1/2, 1
