"""Building a model without initialising it, and strict loading."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crossflow.core.backbones import build_backbone
from crossflow.core.config import BackboneConfig
from crossflow.core.weights import shapes_only, uninitialized


class Network(nn.Module):
    """Parameters filled in each way that networks use, and a table that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Conv2d(2, 2, 3), nn.Embedding(5, 2), nn.LayerNorm(3)])
        self.norm = nn.BatchNorm1d(3)
        self.kept = nn.Parameter(torch.full((2,), 7.0))
        nn.init.xavier_uniform_(self.layers[0].weight)
        nn.init.normal_(self.layers[2].weight, std=0.02)
        nn.init.constant_(self.layers[3].bias, 3.0)
        nn.init.zeros_(self.layers[0].bias)
        nn.init.ones_(self.layers[3].weight)
        self.kept.data.fill_(7.0)
        self.register_buffer("table", torch.arange(4.0).mul_(2))


def test_no_parameter_is_filled_and_no_random_number_drawn():
    before = torch.random.get_rng_state()
    with uninitialized():
        weights = [nn.Parameter(torch.full((2, 2), 7.0)) for _ in range(8)]
        nn.init.normal_(weights[0])
        nn.init.uniform_(weights[1])
        nn.init.constant_(weights[2], 1.0)
        nn.init.zeros_(weights[3])
        nn.init.ones_(weights[4])
        nn.init.kaiming_uniform_(weights[5])
        nn.init.xavier_uniform_(weights[6])
        nn.init.xavier_normal_(tensor=weights[7])
        Network()
    assert all((weight == 7).all() for weight in weights)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_buffers_are_filled_and_later_networks_are_initialised():
    with uninitialized():
        network = Network()
    assert network.table.tolist() == [0, 2, 4, 6]
    assert network.norm.running_var.tolist() == [1, 1, 1]
    assert Network().layers[3].bias.tolist() == [3, 3, 3]
    torch.manual_seed(0)
    first = nn.Linear(3, 4).weight
    torch.manual_seed(0)
    assert torch.equal(nn.Linear(3, 4).weight, first)


class Operations(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_a_network_has_its_tensors_and_nothing_fills_them() -> None:
    config = BackboneConfig(name="dimr", size="tiny")
    network = build_backbone(config, (4, 8, 8))
    with Operations() as operations, shapes_only():
        shapes = build_backbone(config, (4, 8, 8))
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in shapes.state_dict().items()} == expected
    assert all(tensor.is_meta for tensor in shapes.state_dict().values())
    assert not {name.split(".")[0] for name in operations.names} & {"normal_", "uniform_", "fill_", "zero_", "mul_"}
