"""AdamW with averages of eight bits: exact over a resume, and explained where its library is not installed.

bitsandbytes is an extra; without it a stand-in keeps its state in the same forms: bytes, a table that all parameters
share, and a count that is a Python number.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from crossflow.core.errors import UserError
from crossflow.core.training.optim import build_optimizer

TABLE = torch.linspace(-1, 1, 255)


class StandIn(torch.optim.Optimizer):
    """Descends along an average of the gradients that is rounded to the table, a share of its largest value."""

    def __init__(self, params: list[dict], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: dict) -> None:
        state, beta = self.state[parameter], group["betas"][0]
        if not state:
            state.update(step=0, qmap1=TABLE, absmax1=torch.zeros(1))
            state["state1"] = torch.zeros_like(parameter, dtype=torch.uint8)
        state["step"] += 1
        average = state["qmap1"][state["state1"].long()] * state["absmax1"]
        average = average.lerp(parameter.grad, 1 - beta)  # type: ignore[arg-type]
        state["absmax1"] = average.abs().max().view(1).clamp(min=1e-12)
        state["state1"] = ((average / state["absmax1"] + 1) * 127).round().to(torch.uint8)
        parameter.sub_(average / (1 - beta ** state["step"]), alpha=group["lr"])


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    else:
        package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
        module.AdamW8bit = StandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    return request.param


class Wide(nn.Module):
    """The backbone of tiny_run with a layer of 4096 weights, the fewest that bitsandbytes keeps in eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 64), nn.Dropout(0.1), nn.Linear(64, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_a_resumed_run_equals_the_uninterrupted_one(library: str, tiny: ModuleType, tmp_path: Path) -> None:
    def objective() -> nn.Module:
        torch.manual_seed(0)
        objective = tiny.Objective()
        objective.model.backbone = Wide()
        return objective

    tiny.trainer(tmp_path / "through", objective(), optimizer="adamw8bit").run()
    tiny.trainer(tmp_path / "parts", objective(), optimizer="adamw8bit", steps=5).run()
    tiny.trainer(tmp_path / "parts", objective(), optimizer="adamw8bit").run("auto")
    tiny.assert_same_run(tmp_path / "through", tmp_path / "parts")
    state = tiny.everything(tmp_path / "parts")
    bytes_of = {name: value for name, value in state.items() if "state1/model.backbone.layers.1.weight" in name}
    assert [value.dtype for value in bytes_of.values()] == [torch.uint8]
    assert {value.item() for name, value in state.items() if "optimizer.safetensors/step/" in name} == {12}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_the_library_the_extra_is_named() -> None:
    with pytest.raises(UserError, match=r"crossflow-toolkit\[eightbit\].*train\.optimizer=adamw\."):
        build_optimizer(nn.Linear(4, 4), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, name="adamw8bit")
