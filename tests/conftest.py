"""Surroundings of every test: no network, one thread, a cache of its own. Set before any test module imports torch."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads are slower, and sums depend on their number
os.environ.setdefault("MPLBACKEND", "Agg")

# What a user's cache holds must not decide a test. Workers of pytest-xdist inherit the folder of their parent.
_OWNS_CACHE = "PYTEST_XDIST_WORKER" not in os.environ
if _OWNS_CACHE:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="crossflow-test-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWNS_CACHE:
        shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]), ignore_errors=True)
