"""The latent tools: their ends are outputs of sampling, tiles are one picture, noise is shared and added once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.data.resize import center_crop_resize
from crossflow.engine import latents
from crossflow.engine.sample import Pipeline, load


def picture(height: int = 20, width: int = 28, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def pipe(tiny_run) -> Callable[[str], Pipeline]:
    return lambda task: load(tiny_run(task))


def ends(task: str) -> tuple:
    return ("a red cube", "two blue spheres") if task == "t2i" else (picture(seed=1), picture(seed=2))


def same(a: object, b: object) -> bool:
    if isinstance(a, str):
        return a == b
    assert a.shape == b.shape
    return bool(np.abs(a.astype(float) - b.astype(float)).max() < (1.01 if a.dtype == np.uint8 else 1e-3))


@pytest.fixture
def integrated(monkeypatch) -> list[torch.Tensor]:
    """The source latents of every integration."""
    captured: list[torch.Tensor] = []
    real = Pipeline.generate

    def generate(self, source, z0, settings, on_step=None):
        captured.append(z0.clone())
        return real(self, source, z0, settings, on_step)

    monkeypatch.setattr(Pipeline, "generate", generate)
    return captured


@pytest.mark.parametrize("task", ["t2i", "caption", "depth", "sr"])
def test_the_ends_of_an_interpolation_are_the_outputs_of_sampling(pipe, task: str) -> None:
    run, (a, b) = pipe(task), ends(task)
    frames = latents.interpolate(run, a, b, 3, seed=4, output_type="np")
    assert len(frames) == 3
    first = run(a, seed=4, output_type="np")
    assert same(frames[0], first[0])
    assert same(frames[-1], run(b, ids=first.ids, seed=4, output_type="np")[0])
    own = latents.interpolate(run, a, b, 2, seed=4, shared_noise=False, output_type="np")
    assert same(own[0], first[0])
    assert same(own[1], run(b, seed=4, output_type="np")[0])


@pytest.mark.parametrize("task", ["t2i", "caption", "depth", "sr"])
def test_adding_b_and_subtracting_a_turns_a_into_b(pipe, task: str) -> None:
    run, (a, b) = pipe(task), ends(task)
    start, end = latents.arithmetic(run, a, plus=b, minus=a, strengths=[0, 1], output_type="np")
    expected = run(a, output_type="np")
    assert same(start, expected[0])
    assert same(end, run(b, ids=expected.ids, output_type="np")[0])


@pytest.mark.parametrize("term", ["plus", "minus"])
def test_the_sum_carries_the_noise_of_the_base_alone(pipe, integrated: list[torch.Tensor], term: str) -> None:
    run, (a, b) = pipe("t2i"), ends("t2i")
    latents.arithmetic(run, a, **{term: b})
    (z0,) = integrated
    base, mean = latents.encode(run, a).z0, latents.encode(run, b, mode=True).z0
    torch.testing.assert_close(z0, base + mean if term == "plus" else base - mean)
    sample = latents.encode(run, b, id="a red cube/0").z0
    assert (sample - mean).std() > 0.1, "the term has noise that could be added twice"


def test_the_noise_of_two_terms_cancels(pipe, integrated: list[torch.Tensor]) -> None:
    run, (a, b) = pipe("t2i"), ends("t2i")
    latents.arithmetic(run, a, plus=b, minus=b)
    torch.testing.assert_close(integrated[0], latents.encode(run, a).z0)


def test_a_large_picture_goes_through_the_tiles_of_sampling(pipe, integrated: list[torch.Tensor]) -> None:
    run, a, b = pipe("sr"), picture(9, 13, seed=1), picture(9, 13, seed=2)
    expected = run(a, output_type="np")[0]
    integrated.clear()
    frames = latents.interpolate(run, a, b, 3, batch_size=7, output_type="np")
    assert frames[0].shape == (36, 52, 3)
    assert same(frames[0], expected)
    num_tiles = len(run.task.pieces(a).values)
    assert num_tiles > 7
    assert sum(map(len, integrated)) == 3 * num_tiles
    assert max(map(len, integrated)) <= 7


@pytest.mark.parametrize("kind", ["lerp", "slerp"])
def test_tiles_are_interpolated_as_one_picture(pipe, integrated: list[torch.Tensor], kind: str) -> None:
    run = pipe("sr")
    latents.interpolate(run, picture(9, 13, seed=1), picture(9, 13, seed=2), 3, kind=kind)
    num_tiles = sum(map(len, integrated)) // 3
    z0 = torch.cat(integrated)
    first, middle, last = z0.split(num_tiles)
    # one pair of weights solves for all tiles
    ends = torch.stack([first.flatten(), last.flatten()], dim=1)
    weights = torch.linalg.lstsq(ends, middle.flatten()[:, None]).solution
    assert torch.allclose(ends @ weights, middle.flatten()[:, None], atol=1e-4)


def test_tiles_are_restandardised_as_one_picture(pipe, integrated: list[torch.Tensor]) -> None:
    run = pipe("sr")
    latents.arithmetic(run, picture(9, 13, seed=1), plus=picture(9, 13, seed=2), restandardise=True)
    z0 = torch.cat(integrated)
    assert z0.mean().abs() < 1e-5
    assert z0.std() == pytest.approx(1, abs=1e-4)
    assert (z0.flatten(1).mean(1).abs() > 0.01).any(), "tiles by themselves differ"


def test_noise_is_shared_unless_each_input_has_its_own(pipe, integrated: list[torch.Tensor]) -> None:
    run = pipe("t2i")
    latents.interpolate(run, "a cube", "a cube", 2)
    latents.interpolate(run, "a cube", "a cube", 2, shared_noise=False)
    latents.interpolate(run, "a cube", "a cube", 2, shared_noise=False, mode=True)
    shared, own, mean = integrated
    assert torch.equal(shared[0], shared[1])
    assert not torch.allclose(own[0], own[1], atol=0.1)
    assert torch.equal(mean[0], mean[1])


def test_results_do_not_depend_on_the_batch_size(pipe) -> None:
    run = pipe("t2i")
    whole = latents.interpolate(run, "a red cube", "a blue sphere", 5, output_type="np")
    parts = latents.interpolate(run, "a red cube", "a blue sphere", 5, batch_size=2, output_type="np")
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(("solver", "batch_size"), [("euler", 2), ("euler", 64), ("dopri5", 2)])
def test_progress_ends_at_its_total(pipe, solver: str, batch_size: int) -> None:
    steps: list[tuple[int, int]] = []
    latents.interpolate(
        pipe("t2i"), "a", "b", 5, solver=solver, batch_size=batch_size, on_step=lambda *step: steps.append(step)
    )
    done = [step for step, _ in steps]
    assert done == sorted(done)
    (total,) = {total for _, total in steps}
    assert done[-1] == total == (2 if solver == "euler" else 1) * -(-5 // batch_size)


def test_a_large_picture_is_inverted_in_tiles(pipe) -> None:
    steps: list[tuple[int, int]] = []
    run, image = pipe("sr"), picture(30, 45)
    inversion = latents.invert(run, image, steps=8, output_type="np", on_step=lambda *step: steps.append(step))
    z0, (shown, again) = inversion.z0, inversion.outputs
    assert z0.shape == (len(run.task.target(image).values), 3, 16, 16)
    assert len(z0) > 4
    assert again.shape == image.shape
    assert np.abs(again.astype(int) - image).mean() < 3
    assert inversion.error < 0.05
    assert np.array_equal(shown, image), "in pixel space a latent is the picture itself"
    assert steps[-1][0] == steps[-1][1] == 16


def test_depth_is_inverted_and_comes_back_at_its_own_size(pipe) -> None:
    inversion = latents.invert(pipe("depth"), np.full((20, 41), 3.0, np.float32), steps=8)
    z0, (shown, again) = inversion.z0, inversion.outputs.depth
    np.testing.assert_allclose(shown, 3.0, rtol=1e-3)
    assert again.shape == (20, 41)
    assert z0.shape[2] == 16
    assert z0.shape[3] > 16
    assert inversion.error < 0.05


def test_depth_frames_have_the_size_of_the_picture_and_one_scale_of_colours(pipe) -> None:
    run = pipe("depth")
    frames = latents.interpolate(run, picture(20, 28, seed=1), picture(20, 28, seed=2), 3)
    assert {frame.shape for frame in frames} == {(20, 28)}
    near, far = np.full((4, 4), 1.0), np.full((4, 4), 2.0)
    both = run.task.pictures([near, far])
    assert not np.array_equal(both[0], both[1])
    assert np.array_equal(both[1], run.task.pictures([far, near])[0])


@pytest.mark.parametrize(("task", "sizes"), [("sr", ((9, 13), (13, 9))), ("depth", ((20, 40), (40, 20)))])
def test_a_second_picture_is_resized_to_the_first(pipe, task: str, sizes: tuple) -> None:
    run, (a, b) = pipe(task), (picture(*size) for size in sizes)
    frames = latents.interpolate(run, a, b, 2, output_type="np")
    assert frames[0].shape == frames[1].shape
    first = run(a, output_type="np")
    assert same(frames[0], first[0])
    assert same(frames[1], run(center_crop_resize(b, sizes[0]), ids=first.ids, output_type="np")[0])


def test_invalid_arithmetic_is_refused(pipe) -> None:
    run = pipe("t2i")
    with pytest.raises(UserError, match="plus, minus, or both"):
        latents.arithmetic(run, "a cube")
    with pytest.raises(UserError, match="cancel"):
        latents.arithmetic(run, "a cube", minus="a cube", restandardise=True, mode=True)
    with pytest.raises(UserError, match="stepz"):
        latents.arithmetic(run, "a cube", plus="a cube", stepz=3)


@pytest.mark.slow
def test_noise_source_runs_are_inverted_with_their_source_only(tiny_settings, blind_judge, tmp_path: Path) -> None:
    from crossflow.cli import main

    folder = tmp_path / "run"
    assert main(["train", "--task", "sr", "--output", str(folder), "source.kind=gaussian", *tiny_settings("sr")]) == 0
    run, low = load(folder), picture(9, 13)
    with pytest.raises(UserError, match="carry no meaning"):
        latents.interpolate(run, low, low)
    image = picture(36, 52)
    inversion = latents.invert(run, image, source=low, steps=4, output_type="np")
    assert len(inversion.z0) == len(run.task.pieces(low).values)
    assert inversion.outputs[1].shape == image.shape
    with pytest.raises(UserError, match="do not fit"):
        latents.invert(run, picture(20, 20), source=low, steps=4)
    with pytest.raises(UserError, match="belongs to"):
        latents.invert(run, image)
