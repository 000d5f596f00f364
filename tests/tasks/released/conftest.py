"""`recipe`: weights and inputs by name; `recorded`: what the reference networks made of them (tests/golden)."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crossflow_tests_recipe", GOLDEN / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], dict[str, Tensor]]:
    """recorded(NAME): the tensors of tests/golden/NAME.safetensors."""
    from safetensors.torch import load_file

    return lambda name: load_file(GOLDEN / f"{name}.safetensors")
