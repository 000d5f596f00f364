"""A loaded run: an output has one noise at every entry point, and comes in the form asked for; errors are clear."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

import crossflow
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.data.images import read_metadata
from crossflow.engine.sample import Pipeline, load


@pytest.fixture
def pipe(tiny_run) -> Callable[[str], Pipeline]:
    return lambda task: load(tiny_run(task))


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 28, 3), dtype=np.uint8)


# -- noise


@pytest.mark.parametrize("task", ["t2i", "depth"])
def test_an_output_depends_on_its_input_alone(pipe, task: str) -> None:
    run = pipe(task)
    a, b = ("a red cube", "a blue sphere") if task == "t2i" else (picture(1), picture(2))
    together, alone = run([a, b], output_type="np"), run(b, output_type="np")
    np.testing.assert_allclose(together[1].astype(float), alone[0], atol=1.01 if task == "t2i" else 1e-3)
    assert together.ids[1] == alone.ids[0]


def test_repeated_inputs_give_different_outputs(pipe) -> None:
    run = pipe("t2i")
    twice, two = run(["a cube", "a cube"], output_type="np"), run("a cube", num=2, output_type="np")
    assert np.array_equal(np.stack(list(twice)), np.stack(list(two)))
    assert not np.array_equal(two[0], two[1])
    again = run("a cube", ids=[two.ids[1]], output_type="np")
    assert np.abs(again[0].astype(int) - two[1]).max() <= 1
    assert not np.array_equal(run("a cube", seed=1, output_type="np")[0], two[0])


def test_the_command_line_makes_the_same_pictures(pipe, tiny_run, tmp_path: Path) -> None:
    prompts = ["a cone", "a red cube", "a red cube"]
    argv = [word for prompt in prompts for word in ("--prompt", prompt)]
    main(["sample", "--checkpoint", str(tiny_run("t2i")), "--seed", "3", "--output", str(tmp_path), *argv])
    expected = pipe("t2i")(prompts, seed=3, output_type="np")
    for number, (pixels, id) in enumerate(zip(expected, expected.ids, strict=True)):
        file = tmp_path / f"{number:04d}.png"
        assert np.abs(np.array(Image.open(file)).astype(int) - pixels).max() <= 1
        assert read_metadata(file)["item"] == id


def test_the_command_line_enlarges_a_file_as_python_does(pipe, tiny_run, tmp_path: Path) -> None:
    file = tmp_path / "some name.png"
    Image.fromarray(picture()).save(file)
    argv = ["--seed", "3", "--input", str(file), "--output", str(tmp_path / "out")]
    assert main(["sample", "--checkpoint", str(tiny_run("depth")), *argv]) == 0
    written = read_metadata(next((tmp_path / "out").glob("*.png")))
    for form in (file, Image.open(file), picture()):
        assert pipe("depth")(form, seed=3).ids == (written["item"],)


# -- outputs


def test_outputs_are_pil_images_arrays_or_tensors(pipe) -> None:
    run = pipe("t2i")
    images, arrays, tensors = (run("a cube", num=2, output_type=kind) for kind in ("pil", "np", "pt"))
    for image, array, tensor in zip(images, arrays, tensors, strict=True):
        assert isinstance(image, Image.Image)
        assert np.array_equal(np.array(image), array)
        assert tensor.shape == (3, 16, 16)
        assert np.array_equal((tensor * 255).round().byte().movedim(0, -1).numpy(), array)
    assert len(images) == 2
    assert [np.array_equal(*pair) for pair in zip(images.images, images[:2], strict=True)] == [True, True]
    assert (images.seed, images.ids) == (0, ("a cube/0", "a cube/1"))
    with pytest.raises(UserError, match="makes no captions"):
        _ = images.captions
    with pytest.raises(UserError, match="Unknown output type 'jpg'"):
        run("a cube", output_type="jpg")


def test_depth_is_returned_in_metres_and_as_pictures(pipe) -> None:
    outputs = pipe("depth")([picture(1), picture(2)])
    assert [depth.shape for depth in outputs.depth] == [(20, 28)] * 2
    assert outputs.depth[0].dtype == np.float32
    assert [image.size for image in outputs.images] == [(28, 20)] * 2
    assert isinstance(pipe("depth")(picture(), output_type="pt")[0], torch.Tensor)
    with pytest.raises(UserError, match="no depth maps"):
        _ = pipe("t2i")("a cube").depth


def test_captions_are_strings(pipe) -> None:
    outputs = pipe("caption")(Image.fromarray(picture()), num=2)
    assert outputs.captions == list(outputs)
    assert all(isinstance(caption, str) for caption in outputs)
    with pytest.raises(UserError, match=r"read \.captions"):
        _ = outputs.images


def test_outputs_can_be_inputs(pipe) -> None:
    low = picture()
    for kind in ("pil", "np", "pt"):
        enlarged = pipe("sr")(low, output_type=kind)[0]
        assert pipe("depth")(enlarged).depth[0].shape == (80, 112)


def test_latents_are_returned_on_request(pipe) -> None:
    run = pipe("sr")
    assert run(picture()).latents is None
    outputs = run([picture(1)[:9, :13], picture(2)], return_latents=True, output_type="np")
    for pixels, latents, low in zip(outputs, outputs.latents, [picture(1)[:9, :13], picture(2)], strict=True):
        pieces = run.task.pieces(low)
        assert len(latents) == len(pieces.values)
        assert np.array_equal(pieces.join(run.task.decode(latents)), pixels)


# -- the pipeline


@pytest.mark.parametrize(
    "settings", [{}, {"guidance": 2.0, "zero_init": 1}, {"zero_init": 1, "guidance_interval": (0.0, 0.1)}]
)
@pytest.mark.parametrize("guided", ["by the indicator", "by a weaker run"])
def test_at_most_ten_frames_from_prompt_to_network(pipe, monkeypatch, guided: str, settings: dict) -> None:
    run, package = pipe("t2i"), Path(crossflow.__file__).resolve().parent
    if guided == "by a weaker run":
        run.guide_with(pipe("t2i"))
    paths: list[list[str]] = []

    def is_source(file: Path) -> bool:
        return file.is_file() and file.resolve().is_relative_to(package) and "tests" not in file.parts

    forward = type(run.model.backbone).forward

    def count(backbone: torch.nn.Module, *args: object) -> object:
        codes = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))]
        files = [Path(code.co_filename) for code in codes]
        paths.append([code.co_qualname for code, file in zip(codes, files, strict=True) if is_source(file)])
        return forward(backbone, *args)

    monkeypatch.setattr(type(run.model.backbone), "forward", count)
    run("a red cube", steps=4, **settings)
    assert paths
    longest = max(paths, key=len)
    assert len(longest) <= 10, " < ".join(longest)


def test_the_repr_names_run_weights_and_settings(tiny_run) -> None:
    words = repr(load(tiny_run("t2i"), weights="model"))
    assert str(tiny_run("t2i")) in words
    for part in ("t2i", "model weights", "M parameters", "cpu", "euler", "2 steps", "guidance"):
        assert part in words


def test_a_pipeline_moves_to_a_device(pipe) -> None:
    run = pipe("t2i").guide_with(pipe("t2i"))
    assert run.to("cpu") is run
    with pytest.raises(UserError, match="'cuda:77' is unavailable"):
        run.to("cuda:77")
    run.to("meta")
    devices = {parameter.device.type for network in (run.model, run.weak) for parameter in network.parameters()}
    assert devices == {"meta"}


def test_invalid_calls_are_refused(pipe) -> None:
    run = pipe("t2i")
    with pytest.raises(UserError, match="stepz"):
        run("a cube", stepz=3)
    with pytest.raises(UserError, match="Expected a prompt"):
        run(picture())
    with pytest.raises(UserError, match="an id for each of 2 outputs, got 1"):
        run("a cube", num=2, ids=["a"])
    with pytest.raises(UserError, match="num >= 1 outputs of each input, got 0"):
        run("a cube", num=0)


def test_a_saved_pipeline_loads_and_samples_the_same(pipe, tmp_path: Path) -> None:
    run = pipe("t2i")
    copy = crossflow.load(run.save(tmp_path / "copy"))
    assert np.array_equal(copy("a cube", output_type="np")[0], run("a cube", output_type="np")[0])
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == (run.folder / "manifest.json").read_bytes()


# -- the hub


def test_a_revision_of_a_hub_repository_is_loaded(tiny_run, monkeypatch) -> None:
    calls = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str], **options: object) -> str:
        calls.append((repository, revision))
        assert not any("bin" in pattern or "pt" in pattern for pattern in allow_patterns)
        return str(tiny_run("t2i"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("someone/a-run", revision="v1").folder == tiny_run("t2i")
    assert calls == [("someone/a-run", "v1")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), r"someone/a-run \(revision v1\) .* unavailable: offline"),
        (ConnectionError("refused"), "unavailable: refused"),
    ],
)
def test_an_unavailable_repository_is_explained(error: Exception, message: str, monkeypatch) -> None:
    def download(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=message):
        load("someone/a-run", revision="v1")


def test_programming_errors_of_a_download_propagate(monkeypatch) -> None:
    def download(*args: object, **options: object) -> str:
        raise KeyError("bug")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(KeyError):
        load("someone/a-run")


def test_other_places_than_runs_are_explained(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.yaml"):
        load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, but a checkpoint is a run directory"):
        load(tmp_path / "file")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    with pytest.raises(UserError, match="holds no run"):
        load("someone/not-a-run")
