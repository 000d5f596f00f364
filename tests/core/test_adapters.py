"""Adapters merged into the weights of their base: the formula, both ends of the scale, several at a time."""

import pytest
import torch
from torch import Tensor

from crossflow.core.adapters import Adapter, Adapters
from crossflow.core.backbones import build_backbone
from crossflow.core.config import BackboneConfig, FinetuneConfig
from crossflow.core.errors import UserError
from crossflow.core.layers import resize_positions
from crossflow.core.model import CrossFlow
from crossflow.core.source import SourceEncoder
from crossflow.core.training.trained import adapt, default_rank, linear_layers
from crossflow.networks.trunks import IdentityTrunk


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASE = {"a.weight": tensor(6, 4, seed=1), "a.bias": tensor(6, seed=2), "b.weight": tensor(3, 3, seed=3)}
LOW_RANK = {"a.lora_A.default.weight": tensor(2, 4, seed=4), "a.lora_B.default.weight": tensor(6, 2, seed=5)}
WHOLE = {"a.base_layer.bias": tensor(6, seed=6), "b.weight": tensor(5, 3, seed=7), "c": tensor(2, seed=8)}


def stack(**scales: float) -> Adapters:
    both = {"x": Adapter({**LOW_RANK, **WHOLE}, factor=0.5), "y": Adapter(LOW_RANK, factor=2.0)}
    return Adapters(BASE, "", {name: both[name] for name in scales}, scales)


def test_changes_are_scaled_and_added() -> None:
    change = LOW_RANK["a.lora_B.default.weight"] @ LOW_RANK["a.lora_A.default.weight"]
    merged = stack(x=0.8, y=-0.25).merged()
    assert torch.allclose(merged["a.weight"], BASE["a.weight"] + 0.8 * 0.5 * change - 0.25 * 2 * change, atol=1e-6)
    assert torch.allclose(merged["a.bias"], torch.lerp(BASE["a.bias"], WHOLE["a.base_layer.bias"], 0.8))
    # what the base lacks, or has in another size, is there at any scale
    assert torch.equal(merged["b.weight"], WHOLE["b.weight"])
    assert torch.equal(merged["c"], WHOLE["c"])


def test_both_ends_of_the_scale_are_exact() -> None:
    off, on = stack(x=0.0, y=0.0).weights(), stack(x=1.0).weights()
    assert torch.equal(off["a.weight"], BASE["a.weight"])
    assert torch.equal(off["a.bias"], BASE["a.bias"])
    assert torch.equal(on["a.bias"], WHOLE["a.base_layer.bias"])


def model() -> CrossFlow:
    backbone = build_backbone(BackboneConfig(size="tiny", width=16, depth=2, heads=2), (3, 4, 4))
    return CrossFlow(SourceEncoder(IdentityTrunk(3, True), "variational", (3, 4, 4)), backbone)


def test_parts_are_chosen_by_the_names_of_parameters() -> None:
    network = model()
    adapt(
        network, FinetuneConfig(base="x", train=("backbone.blocks.*",), freeze=("*.bias",)), new={"backbone.embed.bias"}
    )
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert "backbone.embed.bias" in trained
    rest = trained - {"backbone.embed.bias"}
    assert rest
    assert all(name.startswith("backbone.blocks.") and name.endswith(".weight") for name in rest)
    assert network.borrowed == network.state_dict().keys() - trained


def test_patterns_without_a_match_name_near_ones() -> None:
    for settings, message in (
        (FinetuneConfig(train=("*.atn.qkv.weight",)), r"finetune.train matches nothing. Near names: .*attn.qkv.weight"),
        (FinetuneConfig(rank=1, targets=("nothing*",)), "finetune.targets matches nothing"),
        (FinetuneConfig(freeze=("*",)), "leaves nothing to be trained"),
    ):
        with pytest.raises(UserError, match=message):
            adapt(model(), settings)


def test_matrices_stand_beside_attention_and_feed_forwards_and_stay_under_their_share() -> None:
    network = model()
    layers = linear_layers(network, FinetuneConfig())
    assert {name.partition(".blocks.")[2][2:] for name in layers} == {"attn.qkv", "attn.out", "mlp.up", "mlp.down"}
    lengths = sum(sum(network.get_submodule(name).weight.shape) for name in layers)
    ranks = [default_rank(network, FinetuneConfig(), total) for total in (0, 400_000, 10**9)]
    assert (ranks[0], ranks[2]) == (1, 32)
    assert ranks[1] * lengths < 0.02 * 400_000 <= 2 * ranks[1] * lengths


def test_positions_are_resized_along_both_axes() -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    table = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    resized = resize_positions(table, (8, 16))
    assert resized is not None
    grid = resized.unflatten(0, (8, 16))
    assert torch.allclose(grid[2:-2, 4, 0], torch.arange(2.0, 6.0) / 2 - 0.25)
    assert torch.allclose(grid[4, 2:-2, 1], torch.arange(2.0, 14.0) / 2 - 0.25)
    assert torch.equal(resize_positions(table, (4, 8)), table)
    assert resize_positions(table[:-1], (8, 16)) is None
