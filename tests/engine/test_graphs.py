"""Exported graphs: computed by onnxruntime or torch alone they equal the run; the program of their README samples."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import crossflow
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.engine.graph_readme import program
from crossflow.engine.graphs import Graph, largest_difference
from crossflow.tasks import load_config, save_model, task_class

RUNS = Path(__file__).parents[1] / "golden" / "runs"


def lively(task: str, folder: Path, *overrides: str) -> Path:
    """A run whose weights are all random, so that no part of a velocity is zero."""
    config = load_config(RUNS / task, overrides)
    adapter = task_class(config.task).load(config, RUNS / task)
    torch.manual_seed(0)
    model = adapter.build_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model(adapter, model, folder)
    return folder


def sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs the program of the README in its folder; returns the output."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    (output,) = folder.glob("output.*")
    return output


@pytest.mark.slow
def test_onnxruntime_alone_makes_the_picture_of_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run, folder = lively("t2i", tmp_path / "run", "sample.guidance_interval=[0,0.6]"), tmp_path / "graphs"
    assert main(["export", str(run), str(folder), "--to", "onnx", "--set", "sample.steps=3"]) == 0
    assert {f"{name} " for name in ("source", "velocity", "decoder")} <= set(
        re.findall(r"\w+ (?=\d\.\de)", capsys.readouterr().out)
    )
    pipe = crossflow.load(run)
    expected = pipe("a red cube", steps=3, mode=True, output_type="np")[0].astype(int)
    pixels = np.array(Image.open(sampled(folder, monkeypatch))).astype(int)
    assert np.abs(pixels - expected).max() <= 1
    assert np.ptp(expected) > 100
    z, t = torch.randn(5, 3, 16, 16), torch.rand(5)
    flags = torch.arange(5) % 2 == 0
    inputs = {"z": z.numpy(), "t": t.numpy(), "unconditional": flags.numpy()}
    (velocity,) = onnxruntime.InferenceSession(folder / "velocity.onnx").run(None, inputs)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(velocity), pipe.model.velocity(z, t, flags), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_torch_alone_makes_the_depth_of_a_flow_map_at_another_size(tmp_path: Path, monkeypatch) -> None:
    flags = ["backbone.interval=added", "interval.target=composition", "sample.solver=map", "sample.guidance=1"]
    run, folder = lively("depth", tmp_path / "run", *flags), tmp_path / "graphs"
    assert main(["export", str(run), str(folder), "--to", "torch", "--size", "16x24"]) == 0
    picture = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "photo.png")
    depth = np.load(sampled(folder, monkeypatch))
    expected = crossflow.load(run)(picture, mode=True, output_type="np")[0]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(depth[0], expected, rtol=1e-4)


class Scaled(torch.nn.Module):
    """x by a factor, which a test changes after the export."""

    factor = 2.0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.factor * x,)


def test_a_graph_that_differs_is_refused(tmp_path: Path) -> None:
    network, inputs = Scaled(), {"x": torch.ones(2, 3)}
    batch = torch.export.Dim("batch", min=1, max=9)
    written = torch.export.export(network, (), inputs, dynamic_shapes={"x": {0: batch}})
    torch.export.save(written, tmp_path / "velocity.pt2")
    assert largest_difference(Graph(network, inputs, ("y",)), tmp_path / "velocity.pt2", "torch") == 0
    network.factor = 2.001
    with pytest.raises(UserError, match=r"velocity\.pt2 differs from its network by 5\.0e-04, more than 1e-04"):
        largest_difference(Graph(network, inputs, ("y",)), tmp_path / "velocity.pt2", "torch")


SETTINGS: dict[str, Any] = {
    "inputs": {
        "source": {"features": ["float32", 77, 768], "mask": ["bool", 77]},
        "velocity": {"z": ["float32", 4, 32, 32]},
        "decoder": {"z": ["float32", 4, 32, 32], "features": ["float32", 77, 768]},
    },
    "outputs": {"source": ["mean"], "velocity": ["velocity"], "decoder": ["output"]},
    "steps": [[0.0, 1.0, 2.0]],
    "jumps": False,
    "source": "deterministic",
    "output": [3, 256, 256],
    "latent": [4, 32, 32],
}


@pytest.mark.parametrize("library", ["onnx", "torch"])
def test_programs_of_all_kinds_of_runs_are_python(library: str) -> None:
    code = program(SETTINGS, library, has_tokenizer=False)
    assert 'np.load("features.npy")' in code
    assert "(mean,) = source(**inputs)" in code
    assert 'decoder(z=z, features=inputs["features"])' in code
    graphs = SETTINGS["inputs"]
    features = graphs["source"]
    noise = {"velocity": graphs["velocity"] | features, "decoder": graphs["decoder"]}
    gaussian = program(SETTINGS | {"inputs": noise, "source": "gaussian"}, library, has_tokenizer=False)
    assert "standard_normal((1, 4, 32, 32), dtype=np.float32)" in gaussian
    assert "unconditional=unconditional, **doubled)" in gaussian
    plain = program(SETTINGS | {"steps": [[0.0, 1.0, 1.0]]}, library, has_tokenizer=False)
    assert "concatenate" not in plain
    words = program(SETTINGS | {"output": [32, 500]}, library, has_tokenizer=True)
    assert "argmax(-1)" in words
    for text in (code, gaussian, plain, words):
        compile(text, "README.md", "exec")


def test_wrong_exports_are_explained(tmp_path: Path, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    new = str(tmp_path / "new")
    for words, message in (
        ([str(tmp_path / "full"), "--to", "torch"], "is not empty. Give a new folder."),
        ([new, "--to", "torch", "--size", "12"], "must be height x width in pixels, such as 96x128, got '12'"),
        ([new, "--to", "torch", "--size", "16x16"], "this run reads text. Leave it out."),
        ([new, "--to", "diffusers", "--size", "16x16"], "a diffusers pipeline takes any size."),
        ([new, "--to", "torch", "--set", "sample.solver=dopri5"], "--set sample.solver=euler"),
    ):
        assert main(["export", str(RUNS / "t2i"), *words]) == 2, words
        assert message in " ".join(capsys.readouterr().err.split()), words
    assert os.listdir(tmp_path) == ["full"]
