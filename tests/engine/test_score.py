"""The loss on held-out items is the same, to the same bits, with any number of processes, which share its batches."""

import json
import math
import os
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from crossflow.core.batch import Batch
from crossflow.core.model import CrossFlow
from crossflow.core.noise import Noise
from crossflow.core.paths import LinearPath
from crossflow.core.source import SourceEncoder
from crossflow.engine.score import _source_numbers, held_out_loss
from crossflow.engine.train import Run
from crossflow.tasks import load_config


@pytest.fixture
def run(tiny_settings, tmp_path: Path) -> Run:
    """A run whose velocity is not zero, so that the losses depend on the sources."""
    run = Run.open(load_config("sr_tiny", tiny_settings("sr")), tmp_path / "run")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return run


def measured(run: Run) -> dict[str, object]:
    """The losses in batches of two of six items, and how many of the batches this process has computed."""
    sizes: list[int] = []
    prepare = run.task.prepare

    def counted(record):
        batch = prepare(record)
        sizes.append(len(batch))
        return batch

    run.task.prepare = counted  # type: ignore[method-assign]
    losses = held_out_loss(run.task, run.model, run.validation, batch_size=2)
    return {"losses": losses, "sizes": sizes}


def test_one_step_of_the_exact_flow_errs_by_the_variance_that_the_source_leaves_open() -> None:
    """Jointly Gaussian z0 and z1 of correlation r: E[z1 | z0] = r z0, and 1 - r^2 is left."""
    z0, rest = torch.randn(2, 20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    r = 0.8
    batch = Batch(features=z0, target=r * z0 + math.sqrt(1 - r**2) * rest, unconditional=torch.zeros(20000) > 0)
    encoder = SourceEncoder(nn.Flatten(0, 0), "deterministic", (1, 1, 1))
    encoder.trunk.forward = lambda features, mask: torch.stack([features, features], 1)  # type: ignore[union-attr]
    model = CrossFlow(encoder, nn.Identity())
    model.backbone.forward = lambda z, *_: [(r - 1) * z]  # type: ignore[method-assign]
    objective = SimpleNamespace(model=model, path=LinearPath(0.0))
    numbers = _source_numbers(objective, batch, Noise(z0, torch.rand(20000), torch.rand(20000)))  # type: ignore[arg-type]
    assert numbers["one_step"] == pytest.approx(1 - r**2, rel=0.03)
    assert numbers["target_variance"] == pytest.approx(1, rel=0.03)
    assert numbers["source_size"] == pytest.approx(1, rel=0.03)
    assert numbers["source_deviation"] == 0


def test_processes_share_the_batches_and_get_the_numbers_of_one(run: Run, tmp_path: Path) -> None:
    assert run.validation  # opened before the processes part
    children = [_in_process(run, rank, tmp_path) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone = measured(run)
    assert alone["sizes"] == [2, 2, 2]
    assert (first["sizes"], second["sizes"]) == ([2, 2], [2])
    assert first["losses"] == second["losses"] == alone["losses"]
    assert alone["losses"]["flow"] != alone["losses"]["flow_shuffled"]  # type: ignore[index]


def _in_process(run: Run, rank: int, folder: Path) -> int:
    """Forks a process that measures its share and saves the result; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            store = dist.FileStore(str(folder / "store"), 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
            (folder / f"{rank}.json").write_text(json.dumps(measured(run)))
            dist.destroy_process_group()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return child
