"""Networks of timm by name, such as `timm:vgg16.tv_in1k`: with published weights, those of a file, or untrained."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.files import read_tensors
from crossflow.networks.frozen import freeze, load_public

SCHEME = "timm:"
Read = Callable[[Path], Mapping[str, Tensor]]
"""File -> its weights by name."""


def timm_network(source: str, read: Read = read_tensors) -> nn.Module:
    """The frozen network `timm:NAME`, `timm:NAME=FILE` or `timm:NAME@random` (untrained, the same every time).

    read: for FILE; by default safetensors alone. Raises UserError for an unknown name and unavailable weights.
    """
    import timm

    name, _, place = source.removeprefix(SCHEME).partition("=")
    name, _, mode = name.partition("@")
    if not source.startswith(SCHEME) or mode not in ("", "random"):
        raise UserError(f"Unknown network {source!r}. Use timm:NAME, timm:NAME=FILE, or timm:NAME@random (untrained).")
    if name.split(".")[0] not in timm.list_models():
        raise unknown_name("timm network", name, timm.list_models(f"*{name.split('_')[0]}*") or timm.list_models()[:20])
    if not (mode or place):
        files = "model.safetensors and config.json of the network"
        return freeze(load_public(functools.partial(timm.create_model, pretrained=True), name, files=files))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(name)
    if place:
        path = Path(place).expanduser()
        if not path.is_file():
            raise UserError(f"The file {path} with weights of {name} does not exist.")
        try:
            network.load_state_dict(read(path))
        except RuntimeError as error:
            raise UserError(f"{path} does not contain the weights of timm's {name}: {str(error)[:300]}") from error
    return freeze(network)
