"""Surroundings of every test: no network, one thread, a cache of its own. Set before any test module imports torch."""

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads are slower, and sums depend on their number
os.environ.setdefault("MPLBACKEND", "Agg")

# Flushing to disk takes a third of the time of a tiny run, and no test simulates a loss of power.
os.fsync = lambda handle: None

# What a user's cache holds must not decide a test. Workers of pytest-xdist inherit the folder of their parent.
_OWNS_CACHE = "PYTEST_XDIST_WORKER" not in os.environ
if _OWNS_CACHE:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="crossflow-test-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWNS_CACHE:
        shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]), ignore_errors=True)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, up to 4, and one more for slow tests, which wait for other processes and for timeouts.

    More would only import libraries more often: each worker has its own, and again in the process that it forks from.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4) if "not slow" in config.option.markexpr else min(cores + 1, 5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First modules that fork, then those with a test marked slow(first=True) and with the most slow tests, so that
    no worker begins a long one when the others are done.
    """
    forking = {item.path for item in items if item.get_closest_marker("forks")}
    marks = [(item.path, mark) for item in items if (mark := item.get_closest_marker("slow"))]
    first = {path for path, mark in marks if mark.kwargs.get("first")}
    num_slow = Counter(path for path, _ in marks)
    items.sort(key=lambda item: (item.path not in forking, item.path not in first, -num_slow[item.path]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What has been imported stays: the collector of garbage need not look at it again and again."""
    gc.freeze()


TINY = [
    "data.image_size=16",
    "data.num_train=24",
    "data.num_val=6",
    "source.width=16",
    "source.depth=1",
    "backbone.width=16",
    "backbone.depth=1",
    "backbone.heads=2",
    "train.steps=2",
    "train.batch_size=4",
    "train.precision=no",
    "sample.steps=2",
]
TINY_TASK = {
    "t2i": [],
    "caption": ["caption.text_steps=4", "caption.text_batch_size=8", "caption.autoencoder.width=16"],
    "depth": [],
    "sr": ["data.image_size=32", "sr.tile=16", "sr.overlap=4"],
}


def _module(path: Path, name: str) -> ModuleType:
    """A module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def forked() -> ModuleType:
    """The module forked.py: programs in processes of their own that need not import torch first."""
    return _module(Path(__file__).with_name("forked.py"), "crossflow_tests_forked")


@pytest.fixture
def forked_pools(forked: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of pools that start afresh are forked from one that has imported torch."""
    import multiprocessing

    contexts = {"spawn": forked.SERVER}
    original = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: contexts.get(method) or original(method))


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny_run.py: a training run of a second."""
    return _module(Path(__file__).parent / "core" / "training" / "tiny_run.py", "crossflow_tests_tiny_run")


@pytest.fixture(scope="session")
def tiny_settings():
    """tiny_settings(task): overrides that make any recipe of the task train in about a second; of several tasks,
    separated by commas, a joint recipe.
    """

    def settings(task: str) -> list[str]:
        names = task.split(",")
        prefixes = {name: f"tasks.{name}." if len(names) > 1 else "" for name in names}
        return [*TINY, *(f"{prefix}{own}" for name, prefix in prefixes.items() for own in TINY_TASK[name])]

    return settings


@pytest.fixture(scope="session")
def blind_judge():
    """The recogniser of scenes takes a minute to train; where its verdicts do not matter, this one sees nothing."""
    from unittest import mock

    def nothing(images):
        return [()] * len(images)

    with mock.patch("crossflow.tasks.t2i.metric.load_recogniser", return_value=nothing):
        yield


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR reads its paraphrases for eight seconds; where its number does not matter, it is left out with a note."""
    from crossflow.tasks.caption import metric

    def absent(part: str, *files: str) -> Path:
        raise metric.JavaUnavailable("the tests do without")

    monkeypatch.setattr(metric, "_require_java", absent)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_settings, blind_judge):
    """tiny_run(task): the directory of a run of two steps, trained once by the command line. Not to be written to.

    The workers of pytest-xdist share the runs: the first that needs one trains it while the others wait.
    """
    from filelock import FileLock

    session = tmp_path_factory.getbasetemp()
    shared = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "runs"
    shared.mkdir(exist_ok=True)

    def run(task: str) -> Path:
        with FileLock(shared / f"{task}.lock"):
            if not (shared / task).exists():
                from crossflow.cli import main

                scratch = shared / f"{task}.scratch"
                assert main(["train", "--task", task, "--output", str(scratch), *tiny_settings(task)]) == 0
                scratch.rename(shared / task)
        return shared / task

    return run
