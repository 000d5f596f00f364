"""The moving average follows its formula, and applying it is undone."""

import pytest
import torch
from torch import nn

from crossflow.core.training.ema import EMA


def set_weights(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_average_follows_the_formula_with_its_warm_up() -> None:
    model = nn.Linear(2, 2)
    set_weights(model, 0.0)
    ema = EMA(model, decay=0.5)
    expected = 0.0
    for n, value in enumerate([1.0, -2.0, 0.5, 3.0, 1.5, 2.0, 7.0, -1.0, 4.0, 5.0, 6.0]):
        set_weights(model, value)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert torch.allclose(ema.state_dict()["weight"], torch.tensor(expected), rtol=1e-6)
    assert ema.num_updates == 11


@pytest.mark.parametrize(("n", "decay"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10**6, 0.99)])
def test_decay_rises_to_its_limit(n: int, decay: float) -> None:
    assert EMA(nn.Linear(1, 1), decay=0.99).decay_at(n) == pytest.approx(decay)


def test_applied_weights_are_the_average_and_are_restored_after_an_error() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9)
    average = ema.state_dict()["weight"].clone()
    set_weights(model, 5.0)
    averages = []

    def fail() -> None:
        with ema.applied(model):
            averages.append(model.weight.detach().clone())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(averages[0], average)
    assert (model.weight == 5).all()
    ema.update()
    assert not torch.equal(ema.state_dict()["weight"], average)


def test_average_of_low_precision_weights_is_float32() -> None:
    model = nn.Linear(2, 2).bfloat16()
    set_weights(model, 1.0)
    ema = EMA(model, decay=0.999)
    set_weights(model, 1.0078125)  # the next bfloat16: a bfloat16 average would never get anywhere in between
    ema.num_updates = 10**6
    ema.update()
    assert ema.state_dict()["weight"].dtype == torch.float32
    assert 1.0 < ema.state_dict()["weight"][0, 0].item() < 1.0001
    with ema.applied(model):
        assert model.weight.dtype == torch.bfloat16
    assert (model.weight == 1.0078125).all()


def test_state_loads_into_the_model_and_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight  # tied
    ema = EMA(model, decay=0.9)
    set_weights(model, 3.0)
    ema.update()
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    assert state.keys() == model.state_dict().keys()
    other = EMA(model, decay=0.9)
    other.load_state_dict(state, num_updates=1)
    model.load_state_dict(state)
    assert torch.equal(model[1].weight, state["0.weight"])
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())
    assert other.num_updates == 1
