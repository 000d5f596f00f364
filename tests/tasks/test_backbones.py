"""Every task trains on every backbone: a gradient reaches each parameter, and a run can be sampled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crossflow.core.noise import training_noise
from crossflow.engine.train import Run
from crossflow.tasks import load_config, task_names

DIMR = ["backbone.name=dimr", "backbone.depth=3", "backbone.num_stages=3"]
BACKBONES = {"dimr": DIMR, "dit_stored": ["backbone.positions=stored", "backbone.time_scale=1"]}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("task", task_names())
def test_gradient_reaches_every_parameter(tiny_settings, tmp_path: Path, task: str, backbone: str) -> None:
    settings = [*tiny_settings(task), *BACKBONES[backbone], "guidance.drop=0.6"]
    run = Run.open(load_config(f"{task}_tiny", settings), tmp_path / "run")
    with torch.no_grad():
        for parameter in run.objective.parameters():  # a fresh DiT is the identity
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = run.task.prepare(run.task.collate([run.data[(0, i)] for i in range(6)]))
    noise = replace(training_noise(0, 0, range(6), run.task.latent_shape), drop=torch.linspace(0, 0.9, 6))
    run.objective(batch, noise)["loss"].backward()
    grads = {name: value.grad for name, value in run.objective.named_parameters() if value.requires_grad}
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
    still = [name for name, grad in grads.items() if grad is not None and grad.abs().max() == 0]
    assert [name for name in still if name.startswith("model.")] == []


def test_dimr_estimates_depth_of_pictures_of_any_shape(tiny_settings, tmp_path: Path) -> None:
    run = Run.open(load_config("depth_tiny", [*tiny_settings("depth"), *DIMR]), tmp_path / "run")
    picture = np.random.default_rng(0).integers(0, 256, (50, 83, 3), dtype=np.uint8)
    (depth,) = run._pipeline()([picture])
    assert depth.shape == (50, 83)
