"""Runs of few steps, distilled from trained ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.settings import build, dump, merge, read
from crossflow.engine import latents
from crossflow.engine.distill import distilled
from crossflow.engine.sample import load
from crossflow.engine.train import Run
from crossflow.tasks import task_names
from crossflow.tasks.sr.config import SrConfig


def test_a_distilled_run_keeps_everything_but_the_steps(tiny_run) -> None:
    teacher = tiny_run("t2i")
    config = distilled(str(teacher), overrides=["train.lr=1e-5"])
    assert config.interval.target == "composition"
    assert config.interval.teacher == config.train.start_from == str(teacher.resolve())
    assert config.interval.guidance == (3.0, 3.0)
    assert (config.backbone.interval, config.backbone.guided, config.source.frozen) == ("added", False, True)
    assert (config.sample.solver, config.sample.steps, config.sample.guidance) == ("map", 4, 1.0)
    assert (config.train.steps, config.train.lr) == (1, 1e-5)
    scaled = distilled(str(teacher), guidance=(1.0, 8.0))
    assert (scaled.backbone.guided, scaled.sample.guidance, scaled.interval.guidance) == (True, 3.0, (1.0, 8.0))
    straight = distilled(str(teacher), method="reflow")
    assert (straight.sample.solver, straight.backbone.interval) == ("euler", "none")
    assert straight.interval.guidance == (3.0, 3.0)
    with pytest.raises(UserError, match="Did you mean 'reflow'"):
        distilled(str(teacher), method="reflo")


def test_what_trained_a_source_or_one_step_is_left_out_of_distillation(tiny_run, tmp_path: Path) -> None:
    settings = read(tiny_run("sr"))
    changed = {
        "loss": {"mean_weight": 1.0, "encoder_gradient": "none", "decoded": "l1"},
        "time": {"at_start": 0.5},
        "sr": {"trunk": "residual"},
    }
    (tmp_path / "config.yaml").write_text(dump(build(SrConfig, merge(settings, changed))))
    config = distilled(str(tmp_path))
    assert (config.loss.decoded, config.loss.mean_weight, config.loss.encoder_gradient) == ("none", 0, "diagonal")
    assert (config.time.at_start, config.time.law, config.sr.trunk) == (0, "uniform", "residual")
    (tmp_path / "config.yaml").write_text(dump(build(SrConfig, merge(settings, {"time": {"at_start": 1.0}}))))
    with pytest.raises(UserError, match="has no flow to distil"):
        distilled(str(tmp_path))


def test_a_distilled_run_begins_with_the_velocities_of_its_teacher(tiny_run, tmp_path: Path) -> None:
    teacher = load(tiny_run("t2i"))
    run = Run.open(distilled(str(tiny_run("t2i")), guidance=(1.0, 8.0)), tmp_path / "run")
    run.release()
    run.objective.train()
    run.model.eval()
    z, t, flags = torch.randn(4, 3, 16, 16), torch.rand(4), torch.tensor([True, False, True, False])
    assert torch.equal(run.model.velocity(z, t, flags), teacher.model.velocity(z, t, flags))
    assert run.task.text.tokenizer.get_vocab() == teacher.task.text.tokenizer.get_vocab()
    assert not any(parameter.requires_grad for parameter in run.model.source_encoder.parameters())
    assert "_teacher" not in "".join(run.objective.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("task", task_names())
def test_every_task_is_distilled_samples_in_few_steps_and_inverts(
    tiny_run, blind_judge, no_java, tmp_path: Path, task: str
) -> None:
    run = tmp_path / "run"
    method = "reflow" if task == "sr" else "composition"
    assert main(["distill", str(tiny_run(task)), "--output", str(run), "--method", method]) == 0
    before, after = load_file(tiny_run(task) / "ema.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("source_encoder."))
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name.startswith("backbone."))
    pipe = load(run)
    expected = "euler" if method == "reflow" else "map"
    assert (pipe.settings.solver, pipe.settings.steps, pipe.model.jumps) == (expected, 4, expected == "map")
    settings = latents.inversion_settings(pipe)
    assert (settings.solver, settings.steps) == (("map", 4) if expected == "map" else ("heun", 50))


@pytest.mark.slow
def test_a_stopped_distillation_continues_to_the_same_bits(tiny_run, blind_judge, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["--guidance", "1:4", "train.schedule=constant", "train.save_every=1"]
    assert main(["distill", str(tiny_run("t2i")), "--output", str(whole), *settings, "train.steps=3"]) == 0
    assert main(["distill", str(tiny_run("t2i")), "--output", str(parts), *settings, "train.steps=1"]) == 0
    assert main(["train", "--output", str(parts), "--resume", "auto", "train.steps=3"]) == 0
    for name in ("model.safetensors", "ema.safetensors"):
        expected, continued = load_file(whole / name), load_file(parts / name)
        assert expected.keys() == continued.keys()
        assert all(torch.equal(expected[key], continued[key]) for key in expected)
    assert main(["doctor", "--config", str(whole), "--strict"]) == 0  # a step of it is rehearsed without memory


def test_what_cannot_be_distilled_is_explained(tiny_run, tmp_path: Path, capsys) -> None:
    plain = str(tiny_run("t2i"))
    picture = tmp_path / "0000.png"
    assert main(["sample", "--checkpoint", plain, "--prompt", "a", "--output", str(tmp_path / "out")]) == 0
    for argv, message in (
        (["distill", str(tmp_path)], "has no config.yaml"),
        (["distill", plain, "--guidance", "strong"], "neither a scale such as 6 nor a range"),
        (["distill", plain, "interval.teacher=" + str(tiny_run("sr")), "--output", str(tmp_path / "x")], "same task"),
        (["sample", "--checkpoint", plain, "--prompt", "a", "--solver", "map"], "needs a flow map"),
        (["invert", "--checkpoint", plain, "--input", str(picture), "--solver", "map"], "--solver heun"),
    ):
        assert main(argv) == 2
        assert message in " ".join(capsys.readouterr().err.split())
