"""What the tests of the core share: networks so small that a test takes milliseconds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossflow.core.backbones import build_backbone
from crossflow.core.config import BackboneConfig


def _perturb(module: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seeds the global generator, so that a test does not depend on the tests before it."""
    torch.manual_seed(12345)


@pytest.fixture
def perturb() -> Callable[..., nn.Module]:
    """perturb(module, seed=0, std=0.1): adds noise to all parameters (a fresh DiT is zero everywhere); returns it."""
    return _perturb


@pytest.fixture
def tiny_dit() -> Callable[..., nn.Module]:
    """tiny_dit(latent_shape, context_dim=None, grid_channels=0, seed=0, **backbone): perturbed, width 16, depth 2."""

    def make(
        latent_shape: tuple[int, ...],
        context_dim: int | None = None,
        grid_channels: int = 0,
        seed: int = 0,
        **backbone: object,
    ) -> nn.Module:
        config = BackboneConfig.model_validate({"width": 16, "depth": 2, "heads": 2, **backbone})
        model = build_backbone(config, latent_shape, context_dim=context_dim, grid_channels=grid_channels)
        return _perturb(model, seed).eval()

    return make


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type != "cpu" and value.dtype == torch.float64:
                raise TypeError(f"{operation}: this device has no float64")
        return result


@pytest.fixture
def no_float64() -> TorchDispatchMode:
    """`with no_float64:` every device but the CPU refuses float64, as Apple's do."""
    return _NoFloat64()
