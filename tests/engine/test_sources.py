"""Runs with other sources: settings reach the model, sampling and inversion, and are refused where they must be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crossflow.benchmarks.ablation.group import load_group
from crossflow.benchmarks.ablation.plan import Budget, Plan
from crossflow.cli import main
from crossflow.core.batch import Condition
from crossflow.core.config import Config
from crossflow.data.images import save_png
from crossflow.tasks import load_config, task_class, task_names


@pytest.mark.parametrize("task", task_names())
@torch.no_grad()
def test_a_backbone_that_keeps_the_condition_reads_it_unless_a_sample_is_unconditional(task, tiny_settings) -> None:
    config = load_config(f"{task}_tiny", [*tiny_settings(task), "source.condition=true"])
    assert isinstance(config, Config)
    adapter = task_class(task).outline(config)
    torch.manual_seed(0)
    model = adapter.build_model()
    for weight in model.parameters():  # a new network's velocity is zero
        weight.add_(0.1 * torch.randn_like(weight))
    z, t = torch.randn(2, *adapter.latent_shape), torch.full((2,), 0.5)
    conditions = [torch.randn(2, 3 if task in ("depth", "sr") else z.shape[1], *z.shape[2:]) for _ in range(2)]
    if model.condition_encoder is None:
        read = [Condition(grid=grid) for grid in conditions]
    else:
        read = [Condition(tokens=torch.randn(2, 4, config.source.width)) for _ in range(2)]
    flags = torch.tensor([False, True])
    first, second = (model.velocity(z, t, flags, condition) for condition in read)
    assert not torch.allclose(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.slow
def test_the_form_of_csfm_trains_samples_and_inverts_with_its_condition(
    tmp_path: Path, tiny_settings, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = Budget(task="depth", recipe="depth_tiny", seeds=(0,), only=("csfm",))
    csfm = Plan(load_group("source"), budget, tmp_path).jobs[0].overrides
    run, photo = tmp_path / "run", str(save_png(np.full((16, 16, 3), 99, np.uint8), tmp_path / "photo.png"))
    assert main(["train", "--task", "depth", "--output", str(run), *csfm, *tiny_settings("depth")]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (val,) = [line for line in lines if line["kind"] == "val"]
    assert val["source_deviation"] == pytest.approx(1)
    assert val["one_step"] > 0
    assert {"flow", "direction", "loss"} <= set(next(line for line in lines if line["kind"] == "train"))
    model = ["--checkpoint", str(run)]
    assert main(["sample", *model, "--input", photo, "--output", str(tmp_path / "out")]) == 0
    depth = str(tmp_path / "out" / "photo_depth_mm.png")
    invert = ["invert", *model, "--input", depth, "--steps", "2", "--output", str(tmp_path / "back")]
    assert main(invert) == 2
    assert main([*invert, "--source", photo]) == 0
    assert main(["interpolate", *model, "--from", photo, "--to", photo]) == 2
    message = capsys.readouterr().err
    assert "reads its input as a condition" in message
    assert "Use a run with source.condition=false" in message


@pytest.mark.slow
def test_an_end_to_end_stage_starts_from_a_run_and_lowers_its_error_in_one_step(
    tiny_run, tmp_path: Path, tiny_settings
) -> None:
    """Without flow loss, at t = 0 alone; a deterministic source reads the weights of a variational one."""
    settings = [word for word in tiny_settings("depth") if not word.startswith(("train.steps", "sample.steps"))]
    own = [f"train.start_from={tiny_run('depth')}", "train.steps=30", "train.warmup_steps=0", "train.log_every=10"]
    argv = [
        "train",
        "--config",
        "depth_end_to_end",
        "--output",
        str(tmp_path / "run"),
        *settings,
        *own,
        "train.lr=5e-3",
    ]
    assert main(argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    curve = [line["decoded"] for line in lines if line["kind"] == "train"]
    assert curve[-1] < 0.8 * curve[0]
    assert [line["loss"] for line in lines if line["kind"] == "train"] == pytest.approx(curve)


@pytest.mark.slow
def test_a_noisy_source_around_a_learned_mean_trains_with_a_decoded_loss(tmp_path: Path, tiny_settings) -> None:
    argv = ["train", "--task", "sr", "--output", str(tmp_path / "run"), *tiny_settings("sr"), "sr.trunk=residual"]
    source = ["source.kind=noisy", "source.noise_scale=0.4", "loss.encoder_gradient=none", "loss.mean_weight=1"]
    network = ["loss.decoded=features", "loss.decoded_network=timm:test_resnet@random"]
    assert main([*argv, *source, *network, "train.log_every=1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "train")
    assert first["loss"] == pytest.approx(first["flow"] + first["mean"] + first["decoded"], rel=1e-4)
    assert first["decoded"] > 0
