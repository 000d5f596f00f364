"""Runs written before the modules were rearranged still load, sample to the same outputs and resume.

tests/golden/runs holds one tiny run per task, written at commit 228bb90, and what it made there of one input from the
mean of the source posterior (so that no noise is involved): 3 Euler steps without guidance.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import crossflow
from crossflow.cli import main

RUNS = Path(__file__).parents[1] / "golden" / "runs"
EXPECTED = json.loads((RUNS / "outputs.json").read_text())
TENSORS = load_file(RUNS / "outputs.safetensors")


@pytest.mark.parametrize("task", ["t2i", "depth", "sr"])
def test_an_old_run_makes_the_same_pictures(task: str):
    value = EXPECTED["prompt"] if task == "t2i" else TENSORS["picture"].numpy()
    (output,) = crossflow.load(RUNS / task)(value, mode=True, steps=EXPECTED["steps"], guidance=1.0, output_type="np")
    expected = TENSORS[task].numpy()
    assert output.dtype == expected.dtype
    np.testing.assert_allclose(output.astype(np.float64), expected, atol=1 if task != "depth" else 1e-4)


def test_an_old_captioning_run_makes_the_same_latents():
    pipe = crossflow.load(RUNS / "caption")
    settings = pipe.sample_settings(mode=True, steps=EXPECTED["steps"], guidance=1.0)
    source = pipe.task.source(pipe.task.pieces(TENSORS["picture"].numpy()).values)
    z1 = pipe.generate(source, pipe.latents(source, ["0"], mode=True), settings)
    torch.testing.assert_close(z1, TENSORS["caption_latent"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_old_run_resumes(tmp_path: Path):
    shutil.copytree(RUNS / "sr", tmp_path / "sr")
    assert main(["train", "--output", str(tmp_path / "sr"), "--resume", "auto", "train.steps=6"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "sr" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps) == 6
