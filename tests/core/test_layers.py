"""Layers: attention against a naive computation, positions against their formula, patches and back."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from crossflow.core.layers import (
    Attention,
    DepthwiseConv,
    FeedForward,
    SampleLinear,
    TimestepEmbedding,
    TransformerLayer,
    patchify,
    sincos_1d,
    sincos_2d,
    sincos_tokens,
    unpatchify,
)
from crossflow.core.weights import shapes_only


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(6, 6), (6, 12)])
def test_unpatchify_undoes_patchify(patch: int, height: int, width: int) -> None:
    x = torch.randn(2, 5, height, width)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, height * width // patch**2, patch**2 * 5)
    assert torch.equal(unpatchify(tokens, patch, height, width), x)


def test_patches_are_row_major_with_channels_fastest() -> None:
    c, h, w = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(6), indexing="ij")
    x = (100 * c + 10 * h + w)[None].float()  # the value tells channel, row and column
    tokens = patchify(x, 2)
    assert tokens[0, 0].tolist() == [0, 100, 200, 1, 101, 201, 10, 110, 210, 11, 111, 211]
    assert tokens[0, 1, 0] == 2, "the next patch is the one to the right"
    assert tokens[0, 3, 0] == 20, "after a row of three patches the one below"


def test_sincos_1d_follows_its_formula() -> None:
    table = sincos_1d(torch.tensor([0, 1, 7]), 6)
    for row, position in enumerate((0, 1, 7)):
        angles = [position * 10000 ** (-2 * i / 6) for i in range(3)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert table[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_sincos_2d_codes_the_column_then_the_row() -> None:
    table = sincos_2d(3, 5, 8)
    assert table.shape == (15, 8)
    assert table.dtype == torch.float32
    line = sincos_1d(torch.arange(5), 4).float()
    for row in range(3):
        for column in range(5):
            assert torch.equal(table[5 * row + column], torch.cat([line[column], line[row]]))


def test_sincos_tables_need_float64_on_the_cpu_only(no_float64) -> None:
    with no_float64:
        for table, shape in ((sincos_2d(2, 3, 8, torch.device("meta")), (6, 8)), (sincos_tokens(5, 6), (5, 6))):
            assert table.shape == shape
            assert table.dtype == torch.float32
        with shapes_only():
            assert sincos_tokens(7, 4).is_meta
    assert sincos_tokens(7, 4).device.type == "cpu"


def test_modifying_a_sincos_table_does_not_affect_later_ones() -> None:
    before = sincos_2d(2, 2, 4)
    sincos_2d(2, 2, 4).zero_()
    assert torch.equal(sincos_2d(2, 2, 4), before)
    assert torch.equal(sincos_tokens(3, 4), sincos_1d(torch.arange(3), 4).float())


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_sincos_tables_are_compiled_without_a_warning_or_a_break() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        return sincos_2d(x.shape[0], x.shape[1], 4, x.device) + sincos_tokens(x.shape[0] * x.shape[1], 4, x.device)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    for height, width in ((2, 3), (3, 4), (5, 6)):  # the sizes become symbols with the second call
        x = torch.zeros(height, width)
        torch.testing.assert_close(compiled(x), both(x), rtol=0, atol=1e-6)


def test_timestep_embedding_is_cosine_first_and_scaled() -> None:
    embedding = TimestepEmbedding(4, scale=1.0, num_frequencies=3)
    calls = []
    embedding.mlp.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    embedding(torch.tensor([0.0, 0.5]))
    angles = [0.5 * 10000 ** (-i / 3) for i in range(3)]
    assert calls[0][0].tolist() == [1, 1, 1, 0, 0, 0]
    assert calls[0][1].tolist() == pytest.approx(
        [math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-6
    )
    scaled = TimestepEmbedding(4, scale=1000.0, num_frequencies=3)
    scaled.load_state_dict(embedding.state_dict())
    assert torch.allclose(scaled(torch.tensor([0.0005])), embedding(torch.tensor([0.5])), atol=1e-6)


def test_self_attention_equals_the_formula_head_by_head() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 2), torch.randn(3, 5, 8)
    q, k, v = attention.qkv(x).split(8, dim=-1)  # [q heads | k heads | v heads]
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 2
        heads.append(scores.softmax(-1) @ v[..., part])
    assert torch.allclose(attention(x), attention.out(torch.cat(heads, -1)), atol=1e-6)


def test_masked_keys_have_no_influence() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    attention, x = Attention(8, 2, context_dim=6), torch.randn(2, 3, 8)
    context = torch.randn(2, 4, 6)
    changed = context.masked_fill(~mask[..., None], 99.0)
    assert torch.allclose(attention(x, context, mask), attention(x, changed, mask))
    assert torch.allclose(attention(x, context, mask)[:1], attention(x[:1], context[:1, :2]), atol=1e-6)
    assert not torch.allclose(attention(x, context, mask)[:1], attention(x[:1], context[:1]), atol=1e-3)


def test_transformer_layer_reads_context_only_where_allowed() -> None:
    torch.manual_seed(0)
    layer, x, context = TransformerLayer(8, 2, context_dim=6), torch.randn(1, 3, 8), torch.randn(1, 4, 6)
    only_first = torch.tensor([[True, False, False, False]])
    changed = context.clone()
    changed[:, 1:] += 1
    assert torch.allclose(
        layer(x, context=context, context_mask=only_first), layer(x, context=changed, context_mask=only_first)
    )
    assert not torch.allclose(layer(x, context=context), layer(x, context=changed), atol=1e-3)


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(AssertionError, match="not a multiple"):
        Attention(10, 3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("num_keys", [7, 600])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_under_bf16_is_that_of_float32_within_its_rounding(num_keys: int, masked: bool, grad: bool) -> None:
    attention = Attention(32, 2, context_dim=8)
    x, context = torch.randn(3, 5, 32), torch.randn(3, num_keys, 8)
    mask = torch.rand(3, num_keys) < 0.6 if masked else None
    if mask is not None:
        mask[:, 0] = True
    outputs = []
    for half in (False, True):
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.set_grad_enabled(grad):
            y = attention(x, context, mask).float()
            if grad:
                y.square().mean().backward()
        outputs.append([y.detach(), *(p.grad.clone() for p in attention.parameters() if p.grad is not None)])
    for exact, rounded in zip(*outputs, strict=True):
        assert (rounded - exact).norm() < 0.03 * exact.norm()
    assert len(outputs[0]) == (7 if grad else 1)


def test_the_exact_gelu_stands_for_the_tanh_form_only_in_a_half_type_on_the_cpu() -> None:
    x = torch.linspace(-6, 6, 2001)
    layer = FeedForward(1, 1)
    for map_ in (layer.up, layer.down):
        torch.nn.init.ones_(map_.weight)
        torch.nn.init.zeros_(map_.bias)
    assert torch.equal(layer(x[:, None])[:, 0], F.gelu(x, approximate="tanh"))
    half = layer.bfloat16()(x.bfloat16()[:, None])[:, 0].float()
    rounded = F.gelu(x.bfloat16().float(), approximate="tanh")
    assert (half - rounded).abs().max() < 4e-3 * 6
    assert ((half - rounded).abs() < 5e-4 + 4e-3 * rounded.abs()).all()


def test_a_depthwise_convolution_on_the_cpu_is_exact_under_autocast() -> None:
    conv = DepthwiseConv(6, 3)
    x = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1, groups=6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), expected)
        assert conv(x.bfloat16()).dtype == torch.float32
    assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_map_of_a_vector_per_sample_is_exact_under_autocast() -> None:
    linear = SampleLinear(6, 5)
    x = torch.randn(3, 6)
    expected = F.linear(x, linear.weight, linear.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), expected)
        assert linear(x.bfloat16()).dtype == torch.float32
    assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_table_made_of_fake_tensors_is_not_kept() -> None:
    with FakeTensorMode():
        assert isinstance(sincos_2d(3, 5, 8), FakeTensor)
    table = sincos_2d(3, 5, 8)
    assert not isinstance(table, FakeTensor)
    assert torch.isfinite(table).all()


@pytest.mark.parametrize("kernel", [3, 7])
def test_a_depthwise_convolution_has_the_gradients_of_torch(kernel: int) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv(5, kernel)
    pixels, weight = torch.randn(3, 9, 6, 5).permute(0, 3, 1, 2), torch.randn(3, 5, 9, 6)  # channels last and first
    gradients = []
    for forward in (conv, super(DepthwiseConv, conv).forward):
        x = pixels.clone().requires_grad_()
        gradients.append(torch.autograd.grad((forward(x) * weight).sum(), (x, conv.weight, conv.bias)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    conv(pixels).sum().backward()  # of an input that needs no gradient
    assert conv.weight.grad is not None
