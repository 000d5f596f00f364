"""Killed jobs are continued to the same bits. The harness beside this file does it sixty times; here are four."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crossflow_tests_harness", Path(__file__).with_name("harness.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def killer(harness: ModuleType, forked: ModuleType, tmp_path: Path):
    return harness.Killer(forked, tmp_path, random.Random(0))


def test_a_training_survives_kills_also_inside_a_save(harness: ModuleType, killer) -> None:
    (job,) = (job for job in harness.jobs(6, ["depth"], killer.folder) if job.name == "train-depth")
    job.kills, job.kills_in_save = 3, 1
    killer.torture(job)
    assert (job.survived, job.problems) == (3, [])


def test_an_evaluation_survives_a_kill(harness: ModuleType, killer, tiny_run) -> None:
    command = ["evaluate", "--checkpoint", str(tiny_run("sr")), "--num", "6", "batch_size=1"]
    job = harness.Job("evaluate", command, kills=1)
    killer.torture(job)
    assert (job.survived, job.problems) == (1, [])


def test_the_harness_notices_what_differs(harness: ModuleType, killer, tmp_path: Path) -> None:
    job = harness.Job("job", [], kills=2)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a").write_text("1")
    assert killer.settled(job, tmp_path / "parts", {"a": b"2", "b": b""}, 2) == 0
    assert job.problems == ["differs: a", "differs: b"]


def test_sixty_kills_are_divided_among_all_jobs(harness: ModuleType, tmp_path: Path) -> None:
    jobs = harness.jobs(60, [], tmp_path)
    assert sum(job.kills for job in jobs) == 60
    assert {job.name for job in jobs} == {
        *(f"{kind}-{task}" for kind in ("train", "evaluate") for task in harness.TASKS), "cache"
    }  # fmt: skip
    assert all(job.kills_in_save > 0 for job in jobs if job.name.startswith("train"))
