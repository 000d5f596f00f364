"""The released text variational encoder: its norm, its mask, its three heads, and its compressor."""

import pytest
import torch
from torch.nn import functional as F

from crossflow.core.errors import UserError
from crossflow.core.source import SourceEncoder
from crossflow.networks.alignment import EmbeddingHead, token_head
from crossflow.networks.text.variational import Adaptor, TextVariationalSizes, TextVariationalTrunk, UnbiasedNorm

GRID, TOKENS = (4, 8, 8), (6, 5)


def trunk(head="flatten", latent_shape=None, feature_width=32, width=32, **settings):
    torch.manual_seed(0)
    shape = latent_shape or (TOKENS if head == "tokens" else GRID)
    sizes = {"num_tokens": 6, "feature_width": feature_width, "width": width, "depth": 2, "hidden": 24, "heads": 4}
    return TextVariationalTrunk(shape, TextVariationalSizes(**sizes | settings), head).eval()


def text(batch=3, width=32):
    features = torch.randn(batch, 6, width, generator=torch.Generator().manual_seed(1))
    return features, torch.arange(6)[None] < torch.tensor([6, 4, 2])[:batch, None]


def test_norm_divides_by_the_unbiased_deviation_and_not_by_its_root():
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    norm = UnbiasedNorm(4)
    with torch.no_grad():
        norm.g.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0]))
        norm.b.copy_(torch.tensor([0.0, 0.0, 0.0, 0.5]))
    deviation = (14 / 3) ** 0.5 + 1e-5
    right = torch.tensor([[-2 / deviation, -2 / deviation, 0.0, 3 / deviation + 0.5]])
    torch.testing.assert_close(norm(x), right)


@pytest.mark.parametrize("head", ["flatten", "adaptor", "tokens"])
@pytest.mark.parametrize("feature_width", [32, 48])
def test_moments_have_the_latents_shape_and_gradients_reach_everything(head, feature_width):
    module = trunk(head, feature_width=feature_width)
    assert (module.compressor is None) == (feature_width == 32)
    features, mask = text(width=feature_width)
    moments = module(features, mask)
    assert moments.shape == (3, 2, *(TOKENS if head == "tokens" else GRID))
    moments.square().mean().backward()
    assert not [
        name for name, weight in module.named_parameters() if weight.grad is None or weight.grad.abs().max() == 0
    ]
    posterior = SourceEncoder(module, "variational", moments.shape[2:])(features, mask)
    torch.testing.assert_close(posterior.mean, moments[:, 0])
    torch.testing.assert_close(posterior.log_var, moments[:, 1])


def test_the_mask_hides_keys_but_padded_positions_are_not_zeroed():
    module, (features, mask) = trunk(), text()
    other = features.clone()
    other[2, 5] += 1  # padding of the last text
    layer = module.layers[0]
    output, other_output = layer(features, mask), layer(other, mask)
    torch.testing.assert_close(output[2, :5], other_output[2, :5])
    assert (module(features, mask)[2] - module(other, mask)[2]).abs().max() > 1e-3
    torch.testing.assert_close(module(features, mask)[:2], module(other, mask)[:2])


def test_a_mask_may_hold_numbers_or_be_empty():
    module, (features, mask) = trunk(), text()
    torch.testing.assert_close(module(features, mask.long()), module(features, mask))
    assert module(features, torch.zeros_like(mask)).isfinite().all()


def test_tokens_are_encoded_without_a_mask():
    module, (features, mask) = trunk("tokens"), text()
    torch.testing.assert_close(module(features, mask), module(features))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "tokens", "latent_shape": GRID}, "tokens predicts"),
        ({"head": "tokens", "latent_shape": (5, 5)}, "with the same N"),
        ({"head": "flatten", "latent_shape": TOKENS}, "flatten and adaptor predict"),
        ({"heads": 5}, "source.heads"),
        ({"heads": 16}, "to 8"),
    ],
)
def test_mismatched_sizes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        trunk(**settings)


def test_another_number_of_tokens_is_refused():
    with pytest.raises(UserError, match="expects 6 tokens, got 5"):
        trunk()(torch.zeros(1, 5, 32))


def test_heads_of_the_alignment():
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    head = EmbeddingHead(6, 256)
    hidden = F.gelu(head.fc1(x))
    assert head.fc1.out_features == 24
    torch.testing.assert_close(head(x), head.fc2(F.layer_norm(hidden, (24,))))  # the norm follows the activation
    assert Adaptor(6, 4, 8, 8)(x).shape == (2, *GRID)
    assert token_head(6, 5)(x[:, None].expand(2, 3, 6)).shape == (2, 3, 5)
