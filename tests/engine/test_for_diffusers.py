"""Exported folders, loaded by diffusers itself: outputs equal those of the run, in the form of diffusers' pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crossflow
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.engine.for_diffusers import export
from crossflow.tasks import load_config, save_model, task_class

pytestmark = pytest.mark.slow
RUNS = Path(__file__).parents[1] / "golden" / "runs"
PICTURES = [np.random.default_rng(0).integers(0, 255, (height, 28, 3), dtype=np.uint8) for height in (20, 20, 24)]


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """exported(task, ...): the diffusers pipeline of a run exported by the command with these further words."""
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def load(task: str, *words: str) -> Any:
        folder = tmp_path / f"exported {len(list(tmp_path.iterdir()))}"
        assert main(["export", str(RUNS / task), str(folder), "--to", "diffusers", *words]) == 0
        return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

    return load


def test_pictures_equal_those_of_the_run(exported, tmp_path: Path) -> None:
    pipe, run, prompts = exported("t2i"), crossflow.load(RUNS / "t2i"), ["a red cube", "a blue sphere"]
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    images = pipe(prompts, num_images_per_prompt=2, generator=torch.Generator().manual_seed(7)).images
    expected = run(prompts, num=2, seed=7, output_type="np")
    assert [np.array_equal(np.array(image), pixels) for image, pixels in zip(images, expected, strict=True)] == [
        True
    ] * 4
    for num in (1, 8, 7):  # sigmas are float32, in which 1 / 7 is rounded
        latents = pipe("a cone", num_inference_steps=num, guidance_scale=2.0, output_type="latent").images
        (z1,) = run("a cone", steps=num, guidance=2.0, return_latents=True).latents
        assert torch.equal(latents[0], z1) if num != 7 else torch.allclose(latents[0], z1, atol=1e-5)
    assert pipe("a cone", output_type="pt").images.shape == (1, 3, 16, 16)
    pipe.save_pretrained(tmp_path / "again")
    again = type(pipe).from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert np.array_equal(again("a cone", output_type="np").images, pipe("a cone", output_type="np").images)


def test_depth_enlarged_pictures_and_captions_come_as_from_diffusers(exported) -> None:
    outputs = {task: exported(task)(image=PICTURES[:2]) for task in ("depth", "sr", "caption")}
    expected = {task: crossflow.load(RUNS / task)(PICTURES[:2], output_type="np") for task in outputs}
    assert np.array_equal(outputs["depth"].prediction[..., 0], np.stack(list(expected["depth"])))
    assert outputs["depth"].prediction.shape == (2, 20, 28, 1)
    assert [np.array_equal(np.array(a), b) for a, b in zip(outputs["sr"].images, expected["sr"], strict=True)] == [
        True
    ] * 2
    assert outputs["caption"].text == expected["caption"].captions
    pipe = exported("depth")
    assert pipe(PICTURES[0], output_type="pt", return_dict=False)[0].shape == (1, 1, 20, 28)
    assert [depth.shape for depth in pipe(PICTURES).prediction] == [(20, 28, 1), (20, 28, 1), (24, 28, 1)]


def test_schedulers_are_those_of_the_run_or_those_that_are_set(exported) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    pipe, run = exported("sr", "--set", "sample.solver=ab2"), crossflow.load(RUNS / "sr")
    assert pipe.scheduler is None
    assert np.array_equal(np.array(pipe(PICTURES[0]).images[0]), run(PICTURES[0], solver="ab2", output_type="np")[0])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert np.array_equal(np.array(pipe(PICTURES[0]).images[0]), run(PICTURES[0], solver="euler", output_type="np")[0])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted = pipe(PICTURES[0], output_type="latent").images[0]
    assert not torch.equal(shifted, run(PICTURES[0], return_latents=True).latents[0])
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(
        UserError, match=r"FlowMatchHeunDiscreteScheduler chooses its own times .* pipe\.scheduler = None"
    ):
        pipe(PICTURES[0])


def test_a_flow_map_jumps_by_the_scheduler_for_flow_maps(tmp_path: Path, monkeypatch) -> None:
    from diffusers import DiffusionPipeline

    settings = ["backbone.interval=added", "interval.target=composition", "sample.solver=map", "sample.guidance=1"]
    config = load_config(RUNS / "sr", settings)
    task = task_class(config.task).load(config, RUNS / "sr")
    torch.manual_seed(0)
    model = task.build_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_model(task, model, tmp_path / "map")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = DiffusionPipeline.from_pretrained(export(tmp_path / "map", tmp_path / "out"), trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == "FlowMapEulerDiscreteScheduler"
    run = crossflow.load(tmp_path / "map")
    for num in (1, 2, 3):  # the scheduler adds in float64
        latents = pipe(PICTURES[0], num_inference_steps=num, output_type="latent").images[0]
        (z1,) = run(PICTURES[0], steps=num, return_latents=True).latents
        torch.testing.assert_close(latents, z1, rtol=0, atol=1e-6)
    assert not torch.allclose(z1, run(PICTURES[0], steps=1, return_latents=True).latents[0], atol=1e-4)


def test_wrong_calls_and_dtypes_are_explained(exported, tmp_path: Path, capsys) -> None:
    pipe = exported("t2i")
    with pytest.raises(UserError, match=r"takes a prompt: pipe\(prompt\)"):
        pipe()
    with pytest.raises(UserError, match=r"Unknown output type 'latents'\. Did you mean 'latent'"):
        pipe("a cone", output_type="latents")
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert pipe.model.pipe.precision == "bf16"
    with pytest.raises(UserError, match=r"Unknown dtype torch\.float64"):
        pipe.to(torch.float64)
    assert main(["export", str(RUNS / "t2i"), str(tmp_path)]) == 2
    assert "is not empty. Give a new folder." in capsys.readouterr().err
