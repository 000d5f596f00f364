"""Networks as shapes: the same tensors, none of them computed."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crossflow.core.backbones import build_backbone
from crossflow.core.config import BackboneConfig
from crossflow.core.shapes import shapes_only


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


def test_tensors_with_memory_are_filled() -> None:
    with shapes_only():
        weight = torch.empty(3, device="cpu")
        torch.nn.init.constant_(weight, 2.0)
    assert weight.tolist() == [2.0, 2.0, 2.0]
