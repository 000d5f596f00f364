"""`tiny`: the module beside this file that sets up a training run of a second."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips flushing to disk, which takes most of the time of a tiny run; no test simulates a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    path = Path(__file__).with_name("tiny_run.py")
    spec = importlib.util.spec_from_file_location("crossflow_tests_tiny_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
