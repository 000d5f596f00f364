"""The text trunk: both moments of a latent of any shape, without influence of the padding."""

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.core.source import SourceEncoder
from crossflow.networks.text.trunk import TextTransformer, TextTrunk

LATENTS = [(3, 16, 16), (4, 8, 16), (1, 32, 32), (12, 16), (5, 3)]


def transformer(**settings):
    inputs = {} if "feature_width" in settings else {"vocab_size": 50}
    return TextTransformer(**inputs | {"width": 16, "depth": 1, "heads": 2} | settings)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("head", ["queries", "flatten"])
def test_trunk_predicts_both_moments_of_any_latent(latent, head):
    trunk = TextTrunk(latent, transformer(max_length=9), head=head)
    ids, mask = torch.randint(50, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    assert trunk(ids, mask).shape == (3, 2, *latent)
    encoder = SourceEncoder(trunk, "variational", latent)
    assert encoder(ids, mask).sample(generator=torch.Generator().manual_seed(0)).shape == (3, *latent)


@pytest.mark.parametrize("head", ["queries", "flatten"])
@pytest.mark.parametrize("frozen", [False, True])
def test_padding_has_no_influence(head, frozen):
    inputs = {"feature_width": 6} if frozen else {"vocab_size": 50}
    trunk = TextTrunk((2, 8, 8), transformer(max_length=10, depth=2, **inputs), head=head)
    x = torch.randn(2, 10, 6) if frozen else torch.randint(50, (2, 10))
    mask = torch.arange(10) < torch.tensor([[4], [7]])
    out = trunk(x, mask)
    other = x.clone()
    other[~mask] = 33
    torch.testing.assert_close(trunk(other, mask), out)
    torch.testing.assert_close(trunk(x[:, :7], mask[:, :7]), out, atol=1e-5, rtol=1e-4)
    other = x.clone()
    other[0, 3] = 1
    assert not torch.allclose(trunk(other, mask)[0], out[0])


@pytest.mark.parametrize("head", ["queries", "flatten"])
def test_a_row_without_tokens_is_finite_and_trains(head):
    trunk = TextTrunk((2, 4, 4), transformer(max_length=6), head=head)
    mask = torch.tensor([[False] * 6, [True] * 6])
    out = trunk(torch.zeros(2, 6, dtype=torch.int64), mask)
    assert out.isfinite().all()
    out.square().sum().backward()
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_default_patches_keep_the_number_of_queries_small():
    for latent in [(3, 32, 32), (4, 64, 64), (1, 48, 96)]:
        assert len(TextTrunk(latent, transformer(width=32)).head.queries) <= 64


def test_invalid_shapes_are_refused():
    with pytest.raises(UserError, match="at most 4 tokens, got 5"):
        TextTransformer(vocab_size=9, max_length=4, width=8, heads=2)(
            torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5) > 0
        )
    with pytest.raises(UserError, match="patch of 3"):
        TextTrunk((3, 8, 8), transformer(), patch=3)
    with pytest.raises(UserError, match="queries or flatten"):
        TextTrunk((3, 8, 8), transformer(), head="mean")
