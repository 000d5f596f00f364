"""Between two logs the host never waits for the device: no step reads a value back, in training or in sampling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from crossflow.core.batch import Batch
from crossflow.core.config import Config
from crossflow.core.model import CrossFlow
from crossflow.core.noise import training_noise
from crossflow.core.objective import Objective
from crossflow.core.sampling import generate
from crossflow.core.settings import build
from crossflow.core.source import SourceEncoder
from crossflow.core.training.learner import Learner
from crossflow.core.training.prepare import build_accelerator
from crossflow.core.training.stream import MicroBatch

LATENT, SIZE = (2, 8, 8), 6
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"}


class HostReads(TorchDispatchMode):
    """Records the operations whose result the host needs: on a GPU it would wait there for all work before them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(value, Tensor) and value.dtype == torch.bool for value in tree_iter(args[1:2])
        )
        if name in READS or by_mask:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 256)])

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.blocks[1](self.blocks[0](features).relu()).unflatten(1, (2, *LATENT))


@pytest.fixture
def model(tiny_dit: Callable) -> CrossFlow:
    torch.manual_seed(0)
    return CrossFlow(SourceEncoder(Trunk(), "variational", LATENT), tiny_dit(LATENT))


def micro_batch(part: int) -> MicroBatch:
    samples = range(part * SIZE, (part + 1) * SIZE)
    noise = training_noise(0, 0, samples, LATENT)
    target = torch.randn(SIZE, *LATENT, generator=torch.Generator().manual_seed(part))
    batch = Batch(torch.ones(SIZE, 3), target, weight=(target[:, :1] > -1).float(), alignment=target.flatten(1))
    return MicroBatch(batch, noise)


def test_the_mode_sees_reads_and_masks() -> None:
    x = torch.arange(4.0)
    for read in (
        lambda: x[2].item(),
        lambda: bool((x > 1).any()),
        lambda: x[x > 1],
        lambda: (x > 1).nonzero(),
        lambda: x.index_put((x > 1,), x[0]),
        lambda: x[torch.tensor(1)],
    ):
        with HostReads() as mode:
            read()
        assert mode.reads, read
    with HostReads() as mode:
        x[torch.tensor([1, 2])] + x[1:3]
    assert not mode.reads


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("encoder", ["none", "contrastive", "sigmoid"])
def test_a_training_step_reads_nothing(model: CrossFlow, tmp_path: Path, optimizer: str, encoder: str) -> None:
    train = {"optimizer": optimizer, "precision": "bf16", "ema": 0.9}
    loss = {"encoder": encoder}
    config = build(Config, {"task": "toy", "train": train, "loss": loss, "guidance": {"drop": 0.4}})
    objective = Objective(model, config, alignment_head=nn.Linear(128, 128)).train()
    learner = Learner(config.train, objective, build_accelerator(config.train, tmp_path))
    parts = [micro_batch(0), micro_batch(1)]
    learner.step(parts, 1e-3)
    with HostReads() as mode:
        result = learner.step(parts, 1e-3)
    assert mode.reads == []
    assert torch.isfinite(result.losses).all()


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ab2", "euler", "heun", "midpoint", "rk4"])
@pytest.mark.parametrize("weak", [False, True])
def test_a_sampling_step_reads_nothing(model: CrossFlow, solver: str, weak: bool) -> None:
    z0 = torch.randn(2, *LATENT)
    settings = {"guidance": 3.0, "guidance_interval": (0.2, 0.8), "zero_init": 1, "weak": model if weak else None}
    generate(model, z0, solver=solver, steps=5, **settings)
    with HostReads() as mode:
        generate(model, z0, solver=solver, steps=5, **settings)
    assert mode.reads == []
