"""Commands in several processes: the items are shared, the result is that of one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from crossflow.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def in_two_processes(forked: ModuleType, tmp_path: Path) -> Callable[..., str]:
    """in_two_processes(...): runs a command and returns what both have printed."""

    def run(*argv: str) -> str:
        return "".join([process.finish() for process in forked.ranks(2, ["-m", "crossflow", *argv], tmp_path)])

    return run


def test_an_evaluation_is_shared_and_is_that_of_one_process(tiny_run, in_two_processes, tmp_path: Path) -> None:
    argv = ["evaluate", "--checkpoint", str(tiny_run("sr")), "--num", "10", "batch_size=3"]
    assert main([*argv, "--output", str(tmp_path / "one")]) == 0
    output = in_two_processes(*argv, "--output", str(tmp_path / "two"))
    assert output.count("Wrote ") == 1
    alone, shared = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert alone["scores"] == shared["scores"]
    assert alone["baseline"] == shared["baseline"]
    assert (alone["manifest"]["processes"], shared["manifest"]["processes"]) == (1, 2)
    rows = [(tmp_path / name / "items.jsonl").read_text() for name in ("one", "two")]
    assert rows[0] == rows[1]
    pages = [np.array(Image.open(tmp_path / name / "pictures.png")) for name in ("one", "two")]
    assert np.array_equal(*pages)


def test_distances_by_two_processes_are_those_of_one(tiny_run, in_two_processes, tmp_path: Path) -> None:
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (40, 44, 3), dtype=np.uint8)
        folder = tmp_path / "data" / ("train" if number < 5 else "test")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(folder / f"{number}.png")
    rules = tmp_path / "mini.yaml"
    rules.write_text(
        "extends: imagenet-64-256\nsplit: test\nnetworks: {features: timm:test_resnet@random}\nsr: {crop: 32}\n"
        "distribution: {numbers: [fid, kid, is], size: 32}\n"
    )
    data = f"folder:{tmp_path / 'data'}"
    argv = ["evaluate", "--checkpoint", str(tiny_run("sr")), "--protocol", str(rules), "--data", data]
    in_two_processes(*argv, "batch_size=2", "--output", str(tmp_path / "two"))
    assert main([*argv, "batch_size=4", "--output", str(tmp_path / "one")]) == 0
    alone, shared = (json.loads((tmp_path / name / "metrics.json").read_text())["scores"] for name in ("one", "two"))
    assert "frechet_distance" in alone
    assert alone == pytest.approx(shared, rel=1e-4, abs=1e-4)


def test_sampling_is_shared_and_other_commands_run_in_one_process(tiny_run, in_two_processes, tmp_path: Path) -> None:
    run = str(tiny_run("t2i"))
    prompts = [word for number in range(3) for word in ("--prompt", f"{number} cubes")]
    argv = ["sample", "--checkpoint", run, *prompts, "--num", "2"]
    assert main([*argv, "--output", str(tmp_path / "one")]) == 0
    output = in_two_processes(*argv, "--output", str(tmp_path / "two"))
    assert output.count("Wrote 7 files") == 1
    for file in (tmp_path / "one").glob("*.png"):
        a, b = (np.array(Image.open(folder / file.name)).astype(int) for folder in (file.parent, tmp_path / "two"))
        assert np.abs(a - b).max() <= 1
    argv = ["interpolate", "--checkpoint", run, "--from", "a", "--to", "b", "--frames", "2"]
    assert in_two_processes(*argv, "--output", str(tmp_path / "i")).count("Wrote ") == 1


def test_an_error_ends_all_processes_with_one_paragraph(tiny_run, forked: ModuleType, tmp_path: Path) -> None:
    """Under the launcher of torch, which takes --num for an option of its own unless -- is in front."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "crossflow", "--"]
    argv = ["sample", "--checkpoint", str(tiny_run("t2i")), "--prompt", "a", "--num", "1", "--solver", "eulr"]
    process = forked.Forked([*launcher, *argv], tmp_path / "log", PYTHONPATH=os.pathsep.join(sys.path))
    assert process.wait() != 0
    assert "Did you mean 'euler'" in process.output()
    assert "cli.py" not in process.output(), "our own traceback"


def test_triton_reports_nothing_when_a_command_exits() -> None:
    pytest.importorskip("triton")
    script = "import sys, triton\nfrom crossflow.__main__ import run\nsys.argv = ['crossflow', '--version']\nrun()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
