"""The schedule's values, and which parameters weight decay acts on."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from crossflow.core.training import optim
from crossflow.core.training.optim import build_optimizer, decay_groups, learning_rate, orthogonalised


def test_warm_up_is_linear_and_reaches_the_rate_with_its_last_step() -> None:
    rates = [learning_rate(step, lr=2.0, warmup_steps=4, steps=10) for step in range(10)]
    assert rates == [0.5, 1.0, 1.5, 2.0, *[2.0] * 6]


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, lr=0.3, warmup_steps=0, steps=10) == 0.3


def test_cosine_falls_from_the_rate_to_the_final_rate_of_the_last_step() -> None:
    settings = {"lr": 1.0, "warmup_steps": 2, "steps": 12, "schedule": "cosine", "final_lr": 0.1}
    rates = [learning_rate(step, **settings) for step in range(12)]
    assert rates[1] == 1.0
    assert rates[11] == pytest.approx(0.1)
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way: 5 of the 10 steps after the warm-up
    assert rates[3] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.2)) / 2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[1:]))


def test_cosine_stays_at_the_final_rate_beyond_the_last_step() -> None:
    assert learning_rate(99, lr=1.0, steps=10, schedule="cosine", final_lr=0.2) == pytest.approx(0.2)


class Zoo(nn.Module):
    """One of everything; the comment says whether weight decay acts on it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)  # weight yes, bias no
        self.patch_embed = nn.Conv2d(3, 4, 2)  # weight yes (a projection), bias no
        self.norm = nn.LayerNorm([2, 3, 3])  # no, although of three dimensions
        self.table = nn.Embedding(5, 4)  # no
        self.pos_embed = nn.Parameter(torch.zeros(1, 7, 4))  # no
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))  # no
        self.queries = nn.Parameter(torch.zeros(3, 4))  # no
        self.null_context = nn.Parameter(torch.zeros(1, 1, 4))  # no
        self.nodecay_weight = nn.Parameter(torch.zeros(4, 4))  # no
        self.scale = nn.Parameter(torch.zeros(()))  # no
        self.mixing = nn.Parameter(torch.zeros(4, 4))  # yes
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)  # in no group
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])  # weight yes, bias no
        self.tied = nn.Linear(4, 5, bias=False)  # no: it is the table
        self.tied.weight = self.table.weight


def test_weight_decay_excludes_norms_biases_embeddings_vectors_and_nodecay() -> None:
    zoo = Zoo()
    names = {parameter: name for name, parameter in zoo.named_parameters()}
    decayed, undecayed = decay_groups(zoo, 0.03)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.03, 0.0)
    expected = {"linear.weight", "patch_embed.weight", "mixing", "blocks.0.weight"}
    assert {names[parameter] for parameter in decayed["params"]} == expected
    everything = [*decayed["params"], *undecayed["params"]]
    assert len(everything) == len(set(everything))
    assert {names[parameter] for parameter in everything} == set(names.values()) - {"frozen"}


def test_a_step_without_gradient_shrinks_exactly_the_decayed_weights() -> None:
    zoo = Zoo()
    with torch.no_grad():
        for parameter in zoo.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(zoo, lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    for parameter in zoo.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(zoo.mixing, torch.tensor(1 - 0.1 * 0.5))
    for parameter in (
        zoo.pos_embed,
        zoo.queries,
        zoo.null_context,
        zoo.norm.weight,
        zoo.table.weight,
        zoo.linear.bias,
        zoo.frozen,
    ):
        assert torch.equal(parameter, torch.ones_like(parameter))


def _steps(optimizer: torch.optim.Optimizer, zoo: Zoo, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in zoo.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_muon_moves_matrices_of_blocks_by_orthogonal_steps_and_the_rest_as_adamw() -> None:
    zoo, twin = Zoo(), Zoo()
    twin.load_state_dict(zoo.state_dict())
    hidden = zoo.blocks[0].weight
    before = hidden.detach().clone()
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 1e-9}
    _steps(build_optimizer(zoo, name="muon", **settings), zoo, range(1))
    _steps(build_optimizer(twin, **settings), twin, range(1))
    move = before - hidden.detach()
    singular = torch.linalg.svdvals(move) / (0.1 * 0.2 * 4**0.5)  # 0.2 sqrt(the longer side): the size of an AdamW step
    assert ((singular > 0.5) & (singular < 1.5)).all(), singular
    assert not torch.allclose(hidden, twin.blocks[0].weight)
    for name in ("pos_embed", "table.weight", "patch_embed.weight", "linear.weight", "mixing", "nodecay_weight"):
        assert torch.allclose(zoo.get_parameter(name), twin.get_parameter(name), atol=1e-6), name


def test_muon_resumes_bit_for_bit() -> None:
    settings = {"name": "muon", "lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
    torch.manual_seed(0)
    whole = Zoo()
    halved = Zoo()
    halved.load_state_dict(whole.state_dict())
    _steps(build_optimizer(whole, **settings), whole, range(6))
    first = build_optimizer(halved, **settings)
    _steps(first, halved, range(3))
    second = build_optimizer(halved, **settings)
    second.load_state_dict(first.state_dict())
    for group in second.param_groups:  # the rate of a recipe reaches both parts after loading, too
        group["lr"] = 0.1
    _steps(second, halved, range(3, 6))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, halved.get_parameter(name)), name


def test_orthogonalised_matrices_have_singular_values_near_one_whatever_their_scale() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]).float())
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.equal(orthogonalised(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("largest_batch", [2**26, 1])
def test_matrices_move_as_by_the_muon_of_torch_one_at_a_time(
    largest_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_MUON_BATCH", largest_batch)
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (8, 8), (16, 8), (8, 8)]
    blocks = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    twin = [nn.Parameter(block.weight.detach().clone()) for block in blocks]
    batched = build_optimizer(blocks, name="muon", lr=0.02, betas=(0.9, 0.99), weight_decay=0.1)
    reference = torch.optim.Muon(twin, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for block, parameter in zip(blocks, twin, strict=True):
            block.weight.grad = torch.randn_like(parameter)
            parameter.grad = block.weight.grad.clone()
        batched.step()
        reference.step()
    for block, parameter, start in zip(blocks, twin, shapes, strict=True):
        moved = 4 * 0.02 * 0.2 * max(start) ** 0.5  # the length of a singular direction's way
        assert (block.weight - parameter).abs().max() < 0.02 * moved, start


def test_adamw_makes_one_fused_pass_where_torch_has_it_except_under_loss_scaling() -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
    fused, scaled = build_optimizer(Zoo(), **settings), build_optimizer(Zoo(), scaled=True, **settings)
    assert [group["fused"] for group in fused.param_groups] == [True, True]
    assert not any(group["fused"] for group in scaled.param_groups)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_of_an_unfused_optimizer_continues_in_a_fused_one(name: str) -> None:
    settings = {"name": name, "lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}
    torch.manual_seed(0)
    zoo, twin = Zoo(), Zoo()
    twin.load_state_dict(zoo.state_dict())
    before = build_optimizer(zoo, scaled=True, **settings)
    _steps(before, zoo, range(3))
    twin.load_state_dict(zoo.state_dict())
    after = build_optimizer(twin, **settings)
    slots = copy.deepcopy(before.state_dict()["state"])
    after.load_state_dict({"state": slots, "param_groups": after.state_dict()["param_groups"]})
    _steps(before, zoo, range(3, 5))
    _steps(after, twin, range(3, 5))
    for parameter, other in zip(zoo.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)
