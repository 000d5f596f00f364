"""A pipeline computes on the device and in the precision that are set; results are those of float32 up to rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.precision import SMALLEST_ON_CPU, autocast, default_precision
from crossflow.engine import latents
from crossflow.engine.sample import load
from crossflow.tasks import task_names

CPU = torch.device("cpu")


def picture(side: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", task_names())
def test_bf16_is_float32_up_to_rounding(tiny_run, name: str) -> None:
    value = "a red cube" if name == "t2i" else picture()
    exact, rounded = (load(tiny_run(name), precision=precision) for precision in ("float32", "bf16"))
    z1 = [pipe(value, return_latents=True).latents[0] for pipe in (exact, rounded)]
    assert z1[1].dtype == torch.float32
    assert not torch.equal(*z1)
    torch.testing.assert_close(z1[1], z1[0], rtol=0.05, atol=0.05)
    assert "bf16" in repr(rounded)


def test_an_inversion_computes_in_the_chosen_precision_with_a_state_in_float32(tiny_run) -> None:
    exact, rounded = (load(tiny_run("depth"), precision=precision) for precision in ("float32", "bf16"))
    metres = np.full((16, 16), 3.0, np.float32)
    z0 = [latents.invert(pipe, metres, steps=4).z0 for pipe in (exact, rounded)]
    assert z0[1].dtype == torch.float32
    assert not torch.equal(*z0)
    assert not torch.equal(z0[1], z0[1].bfloat16().float())
    torch.testing.assert_close(z0[1], z0[0], rtol=0.05, atol=0.05)


def test_an_adaptive_solver_computes_in_float32(tiny_run) -> None:
    pipes = [load(tiny_run("depth"), precision=precision) for precision in ("float32", "bf16")]
    settings = pipes[0].sample_settings(solver="dopri5", mode=True)
    source = pipes[0].source([picture(16)[:, :16]])
    z0 = pipes[0].latents(source, ["a"], mode=True)
    exact, other = (pipe.generate(source, z0, settings) for pipe in pipes)
    assert torch.equal(exact, other)


def test_a_small_model_on_a_cpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert default_precision(CPU, SMALLEST_ON_CPU - 1) == "float32"
    assert default_precision(CPU, SMALLEST_ON_CPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert default_precision(CPU, 10**9) == "float32"


def test_float32_holds_inside_of_another_autocast() -> None:
    a = torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with autocast(CPU, "float32"):
            assert (a @ a).dtype == torch.float32


def test_the_command_line_and_python_take_the_same_settings(tiny_run, tmp_path: Path) -> None:
    pipe = load(tiny_run("depth"), device="cpu", precision="float32", batch_size=3, offload=True)
    assert (pipe.settings.batch_size, pipe.precision) == (3, "float32")
    options = ["--device", "cpu", "--precision", "bf16", "--batch", "3", "--no-compile", "--offload"]
    command = ["evaluate", "--checkpoint", str(tiny_run("depth")), "--num", "2", "--output", str(tmp_path / "out")]
    assert main([*command, *options]) == 0
    recorded = (tmp_path / "out" / "metrics.json").read_text()
    assert '"precision": "bf16"' in recorded
    assert '"batch_size": 3' in recorded


def test_impossible_precisions_are_refused(tiny_run) -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        load(tiny_run("sr"), device="cpu", precision="fp16")
    with pytest.raises(UserError, match="Unknown precision 'bf61'"):
        load(tiny_run("sr"), precision="bf61")
