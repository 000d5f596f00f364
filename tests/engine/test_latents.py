"""The latent tools: their ends are what sampling gives, tiles are one picture, noise is shared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.data.resize import center_crop_resize
from crossflow.engine import latents
from crossflow.engine.latents import SHARED
from crossflow.engine.sample import Pipeline, load

RNG = np.random.default_rng(0)


def picture(height: int = 20, width: int = 28) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def pipe(tiny_run) -> Callable[[str], Pipeline]:
    return lambda task: load(tiny_run(task))


def ends(task: str) -> tuple:
    return ("a red cube", "two blue spheres") if task == "t2i" else (picture(), picture())


def same(a: object, b: object) -> bool:
    if isinstance(a, str):
        return a == b
    assert a.shape == b.shape
    return bool(np.abs(a.astype(float) - b.astype(float)).max() < (1.01 if a.dtype == np.uint8 else 1e-3))


@pytest.fixture
def started(monkeypatch) -> list[torch.Tensor]:
    """The source latents of every integration."""
    seen: list[torch.Tensor] = []
    real = Pipeline.generate

    def generate(self, source, z0, settings, on_step=None):
        seen.append(z0.clone())
        return real(self, source, z0, settings, on_step)

    monkeypatch.setattr(Pipeline, "generate", generate)
    return seen


@pytest.mark.parametrize("task", ["t2i", "caption", "depth", "sr"])
def test_an_interpolation_begins_and_ends_with_what_sampling_gives(pipe, task: str) -> None:
    run, (a, b) = pipe(task), ends(task)
    frames = latents.interpolate(run, a, b, 3, seed=4)
    assert len(frames) == 3
    assert same(frames[0], run.outputs([a], [SHARED], seed=4)[0])
    assert same(frames[-1], run.outputs([b], [SHARED], seed=4)[0])


@pytest.mark.parametrize("task", ["t2i", "caption", "depth", "sr"])
def test_adding_and_taking_away_lead_to_the_other_input(pipe, task: str) -> None:
    run, (a, b) = pipe(task), ends(task)
    start, end = latents.arithmetic(run, a, plus=b, minus=a, strengths=[0, 1])
    assert same(start, run.outputs([a], [SHARED], seed=0)[0])
    assert same(end, run.outputs([b], [SHARED], seed=0)[0])


def test_a_large_picture_goes_through_the_tiles_of_sampling(pipe, started: list[torch.Tensor]) -> None:
    run, a, b = pipe("sr"), picture(9, 13), picture(9, 13)
    expected = run(a)[0] if isinstance(run(a), list) else run(a)
    started.clear()
    frames = latents.interpolate(run, a, b, 3, batch_size=7)
    assert frames[0].shape == (36, 52, 3)
    assert same(frames[0], expected)
    num_tiles = len(run.task.pieces(a).values)
    assert num_tiles > 7
    assert sum(map(len, started)) == 3 * num_tiles
    assert max(map(len, started)) <= 7


@pytest.mark.parametrize("kind", ["lerp", "slerp"])
def test_tiles_are_interpolated_as_one_picture(pipe, started: list[torch.Tensor], kind: str) -> None:
    run = pipe("sr")
    latents.interpolate(run, picture(9, 13), picture(9, 13), 3, kind=kind)
    num_tiles = sum(map(len, started)) // 3
    z0 = torch.cat(started)
    first, middle, last = z0.split(num_tiles)
    # one pair of weights solves for all tiles
    ends = torch.stack([first.flatten(), last.flatten()], dim=1)
    weights = torch.linalg.lstsq(ends, middle.flatten()[:, None]).solution
    assert torch.allclose(ends @ weights, middle.flatten()[:, None], atol=1e-4)


def test_tiles_are_restandardised_as_one_picture(pipe, started: list[torch.Tensor]) -> None:
    run = pipe("sr")
    latents.arithmetic(run, picture(9, 13), plus=picture(9, 13), restandardise=True)
    z0 = torch.cat(started)
    assert z0.mean().abs() < 1e-5
    assert z0.std() == pytest.approx(1, abs=1e-4)
    assert (z0.flatten(1).mean(1).abs() > 0.01).any(), "tiles by themselves differ"


def test_noise_is_shared_unless_each_input_is_to_have_its_own(pipe, started: list[torch.Tensor]) -> None:
    run = pipe("t2i")
    latents.interpolate(run, "a cube", "a cube", 2)
    latents.interpolate(run, "a cube", "a cube", 2, shared_noise=False)
    latents.interpolate(run, "a cube", "a cube", 2, shared_noise=False, mode=True)
    shared, own, mean = started
    assert torch.equal(shared[0], shared[1])
    assert not torch.allclose(own[0], own[1], atol=0.1)
    assert torch.equal(mean[0], mean[1])


def test_results_do_not_depend_on_the_batch_size(pipe) -> None:
    run = pipe("t2i")
    whole = latents.interpolate(run, "a red cube", "a blue sphere", 5)
    parts = latents.interpolate(run, "a red cube", "a blue sphere", 5, batch_size=2)
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(("solver", "batch_size"), [("euler", 2), ("euler", 64), ("dopri5", 2)])
def test_progress_goes_up_to_its_total(pipe, solver: str, batch_size: int) -> None:
    heard: list[tuple[int, int]] = []
    latents.interpolate(
        pipe("t2i"), "a", "b", 5, solver=solver, batch_size=batch_size, on_step=lambda *step: heard.append(step)
    )
    done = [step for step, _ in heard]
    assert done == sorted(done)
    (total,) = {total for _, total in heard}
    assert done[-1] == total == (2 if solver == "euler" else 1) * -(-5 // batch_size)


def test_a_large_picture_is_inverted_in_tiles(pipe) -> None:
    heard: list[tuple[int, int]] = []
    run, made = pipe("sr"), picture(30, 45)
    z0, again, rmse = latents.invert(run, made, steps=8, on_step=lambda *step: heard.append(step))
    assert z0.shape == (len(run.task.target(made).values), 3, 16, 16)
    assert len(z0) > 4
    assert again.shape == made.shape
    assert np.abs(again.astype(int) - made).mean() < 3
    assert rmse < 0.05
    assert heard[-1][0] == heard[-1][1] == 16


def test_depth_is_inverted_and_comes_back_at_its_own_size(pipe) -> None:
    z0, again, rmse = latents.invert(pipe("depth"), np.full((20, 41), 3.0, np.float32), steps=8)
    assert again.shape == (20, 41)
    assert z0.shape[2] == 16
    assert z0.shape[3] > 16
    assert rmse < 0.05


def test_depth_frames_have_the_size_of_the_picture_and_one_scale_of_colours(pipe) -> None:
    run = pipe("depth")
    frames = latents.interpolate(run, picture(20, 28), picture(20, 28), 3)
    assert {frame.shape for frame in frames} == {(20, 28)}
    near, far = np.full((4, 4), 1.0), np.full((4, 4), 2.0)
    both = run.task.pictures([near, far])
    assert not np.array_equal(both[0], both[1])
    assert np.array_equal(both[1], run.task.pictures([far, near])[0])


@pytest.mark.parametrize(("task", "sizes"), [("sr", ((9, 13), (13, 9))), ("depth", ((20, 40), (40, 20)))])
def test_a_picture_of_another_size_is_brought_to_that_of_the_first(pipe, task: str, sizes: tuple) -> None:
    run, (a, b) = pipe(task), (picture(*size) for size in sizes)
    frames = latents.interpolate(run, a, b, 2)
    assert frames[0].shape == frames[1].shape
    assert same(frames[0], run.outputs([a], [SHARED], seed=0)[0])
    assert same(frames[1], run.outputs([center_crop_resize(b, sizes[0])], [SHARED], seed=0)[0])


def test_impossible_arithmetic_is_refused(pipe) -> None:
    run = pipe("t2i")
    with pytest.raises(UserError, match="plus, minus, or both"):
        latents.arithmetic(run, "a cube")
    with pytest.raises(UserError, match="cancel"):
        latents.arithmetic(run, "a cube", minus="a cube", restandardise=True)
    with pytest.raises(UserError, match="stepz"):
        latents.arithmetic(run, "a cube", plus="a cube", stepz=3)


def test_latents_of_noise_are_refused_and_inverted_with_their_source(
    tiny_settings, blind_judge, tmp_path: Path
) -> None:
    from crossflow.cli import main

    folder = tmp_path / "run"
    assert main(["train", "--task", "sr", "--output", str(folder), "source.kind=gaussian", *tiny_settings("sr")]) == 0
    run, low = load(folder), picture(9, 13)
    with pytest.raises(UserError, match="carry no meaning"):
        latents.interpolate(run, low, low)
    made = picture(36, 52)
    z0, again, _ = latents.invert(run, made, source=low, steps=4)
    assert len(z0) == len(run.task.pieces(low).values)
    assert again.shape == made.shape
    with pytest.raises(UserError, match="not a pair"):
        latents.invert(run, picture(20, 20), source=low, steps=4)
    with pytest.raises(UserError, match="belongs to"):
        latents.invert(run, made)
