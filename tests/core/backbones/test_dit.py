"""DiT: grids of any size, tokens, the indicator, conditions, sizes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crossflow.core.backbones import BACKBONES, build_backbone
from crossflow.core.backbones.dit import SIZES, DiT, DiTBlock
from crossflow.core.batch import Condition
from crossflow.core.config import BackboneConfig
from crossflow.core.errors import UserError
from crossflow.core.weights import shapes_only

GRID, TOKENS = (2, 4, 4), (7, 3)


def inputs(latent_shape: tuple[int, ...], n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, *latent_shape, generator=generator)
    return z, torch.linspace(0.2, 0.8, n), torch.zeros(n, dtype=torch.bool)


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("side", [(4, 4), (8, 8), (4, 12)])
def test_one_network_takes_grids_of_any_size(tiny_dit: Callable, patch: int, side: tuple[int, int]) -> None:
    z, t, flags = inputs((2, *side))
    velocities = tiny_dit(GRID, patch=patch, conv=3)(z, t, flags)
    assert [v.shape for v in velocities] == [z.shape]


@torch.no_grad()
@pytest.mark.parametrize("number", [7, 12])
def test_any_number_of_tokens_is_accepted(tiny_dit: Callable, number: int) -> None:
    z, t, flags = inputs((number, 3))
    assert [v.shape for v in tiny_dit(TOKENS)(z, t, flags)] == [z.shape]


@torch.no_grad()
def test_a_fresh_network_has_velocity_zero() -> None:
    config = BackboneConfig(width=16, depth=2, heads=2, conv=3)
    model = build_backbone(config, GRID, context_dim=6)
    condition = Condition(tokens=torch.randn(2, 5, 6))
    assert model(*inputs(GRID), condition)[0].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("shape", [GRID, TOKENS])
def test_indicator_and_time_change_the_velocity(tiny_dit: Callable, shape: tuple[int, ...]) -> None:
    model, (z, t, flags) = tiny_dit(shape), inputs(shape)
    velocity = model(z, t, flags)[0]
    assert (model(z, t, ~flags)[0] - velocity).abs().amax(dim=tuple(range(1, z.ndim))).min() > 1e-3
    assert (model(z, t + 0.1, flags)[0] - velocity).abs().max() > 1e-3


@torch.no_grad()
def test_each_sample_has_its_own_flag_and_time(tiny_dit: Callable) -> None:
    model, (z, t, _) = tiny_dit(GRID), inputs(GRID)
    flags = torch.tensor([True, False])
    both = model(z, t, flags)[0]
    for i in range(2):
        assert torch.allclose(model(z[i : i + 1], t[i : i + 1], flags[i : i + 1])[0], both[i : i + 1], atol=1e-5)


@torch.no_grad()
def test_only_positions_distinguish_equal_patches(tiny_dit: Callable) -> None:
    z, t, flags = torch.ones(1, 2, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    with_positions = tiny_dit(GRID)(z, t, flags)[0]
    without = tiny_dit(GRID, positions="none")(z, t, flags)[0]
    assert not torch.allclose(with_positions[..., :2, :2], with_positions[..., 2:, 2:], atol=1e-4)
    assert torch.allclose(without[..., :2, :2], without[..., 2:, 2:], atol=1e-5)


@torch.no_grad()
def test_unconditional_samples_do_not_see_the_condition(tiny_dit: Callable) -> None:
    model, (z, t, flags) = tiny_dit(GRID, context_dim=6, grid_channels=3), inputs(GRID)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    conditions = [Condition(torch.randn(2, 4, 6), mask, torch.randn(2, 3, 4, 4)) for _ in range(2)]
    first, second = (model(z, t, ~flags, condition)[0] for condition in conditions)
    assert torch.equal(first, second)
    first, second = (model(z, t, flags, condition)[0] for condition in conditions)
    assert (first - second).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("part", ["tokens", "grid"])
def test_both_parts_of_a_condition_are_read(tiny_dit: Callable, part: str) -> None:
    model, (z, t, flags) = tiny_dit(GRID, context_dim=6, grid_channels=3), inputs(GRID)
    condition = {"tokens": torch.randn(2, 4, 6), "grid": torch.randn(2, 3, 4, 4)}
    changed = {**condition, part: condition[part] + 1}
    assert not torch.allclose(
        model(z, t, flags, Condition(**condition))[0], model(z, t, flags, Condition(**changed))[0]
    )


@torch.no_grad()
def test_masked_condition_tokens_have_no_influence(tiny_dit: Callable) -> None:
    model, (z, t, flags) = tiny_dit(GRID, context_dim=6), inputs(GRID)
    tokens = torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    changed = tokens.masked_fill(~mask[..., None], 9.0)
    assert torch.equal(model(z, t, flags, Condition(tokens, mask))[0], model(z, t, flags, Condition(changed, mask))[0])
    everywhere = torch.ones_like(mask)
    assert torch.equal(model(z, t, flags, Condition(tokens))[0], model(z, t, flags, Condition(tokens, everywhere))[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_equal_gradients(tiny_dit: Callable, dropout: float) -> None:
    model = tiny_dit(GRID, context_dim=6, dropout=dropout).train()
    condition = Condition(tokens=torch.randn(2, 4, 6))
    gradients = []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        torch.manual_seed(0)
        model(*inputs(GRID), condition)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@torch.no_grad()
def test_residual_stream_stays_float32_under_autocast(tiny_dit: Callable) -> None:
    model, types = tiny_dit(GRID), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: types.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs(GRID))
    assert types == [torch.float32, torch.float32]


@pytest.mark.slow
@torch.no_grad()
def test_network_compiles_as_one_graph(tiny_dit: Callable) -> None:
    model = tiny_dit(GRID, context_dim=6, conv=3)
    condition = Condition(tokens=torch.randn(2, 4, 6))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(*inputs(GRID), condition)[0], model(*inputs(GRID), condition)[0], atol=1e-6)


def count(model: DiT) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def standard_count(depth: int, width: int, channels: int, patch: int) -> int:
    """Peebles & Xie's DiT without label table: blocks 18 D^2 + 15 D, timestep, patches in and out (fixed positions)."""
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 6 * width**2 + 6 * width
    time = 257 * width + width**2 + width
    ends = patch**2 * channels * width + width + patch**2 * channels * (width + 1) + 2 * width**2 + 2 * width
    return depth * block + time + ends + 2 * width  # two rows of the indicator


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(4, 64, 64), (77, 16)])
def test_every_size_builds_on_the_meta_device_with_the_count_of_the_standard_dit(
    size: str, shape: tuple[int, ...]
) -> None:
    with shapes_only():
        model = build_backbone(BackboneConfig(size=size), shape)
    depth, width, _ = SIZES[size]
    patch, channels = (2, shape[0]) if len(shape) == 3 else (1, shape[1])
    assert isinstance(model, DiT)
    assert count(model) == standard_count(depth, width, channels, patch)


@pytest.mark.parametrize(("size", "published"), [("S", 33e6), ("B", 130e6), ("L", 458e6), ("XL", 675e6)])
def test_sizes_are_those_of_the_paper(size: str, published: float) -> None:
    """DiT paper, Table 1, whose counts include a table of 1001 labels and the variance channels."""
    with shapes_only():
        model = build_backbone(BackboneConfig(size=size), (4, 32, 32))
    assert isinstance(model, DiT)
    assert count(model) + 1001 * SIZES[size].width == pytest.approx(published, rel=0.02)


def test_width_depth_and_heads_override_the_table() -> None:
    model = build_backbone(BackboneConfig(size="tiny", width=32, depth=3, heads=8), GRID)
    assert isinstance(model, DiT)
    assert len(model.blocks) == 3
    assert model.embed.out_features == 32


def test_errors_name_valid_names_and_sizes() -> None:
    with pytest.raises(UserError, match=r"Unknown backbone 'dti'\. Did you mean 'dit'"):
        build_backbone(BackboneConfig(name="dti"), GRID)
    with pytest.raises(UserError, match=r"Unknown DiT size 'tinny'\. Did you mean 'tiny'"):
        build_backbone(BackboneConfig(size="tinny"), GRID)
    with pytest.raises(UserError, match=r"multiple of 4 and of backbone\.heads = 3"):
        build_backbone(BackboneConfig(width=16, heads=3), GRID)
    model = build_backbone(BackboneConfig(width=16, heads=2, depth=1), GRID)
    with pytest.raises(UserError, match="5 x 4 cannot be cut into patches of 2 x 2"):
        model(*inputs((2, 5, 4)))
    assert "dit" in BACKBONES.names()


@torch.no_grad()
def test_a_block_is_its_formula_written_out(perturb: Callable) -> None:
    block = perturb(DiTBlock(8, 2, context_dim=None))
    x, c = torch.randn(2, 5, 8), torch.randn(2, 8)
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        part[:, None] for part in block.modulation[1](torch.nn.functional.silu(c)).split(8, dim=1)
    )
    normed = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    y = x + gate1 * block.attn(normed * (1 + scale1) + shift1)
    normed = torch.nn.functional.layer_norm(y, (8,), eps=1e-6)
    expected = y + gate2 * block.mlp(normed * (1 + scale2) + shift2)
    assert torch.allclose(block(x, c, None, None, None, None), expected, atol=1e-6)
