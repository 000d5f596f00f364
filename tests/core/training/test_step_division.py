"""An optimizer step is that of one process with the whole batch, however it is divided into parts and processes."""

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossflow.core.batch import Batch, Record
from crossflow.core.config import Config
from crossflow.core.model import CrossFlow
from crossflow.core.noise import training_noise
from crossflow.core.objective import Objective
from crossflow.core.settings import build
from crossflow.core.source import SourceEncoder
from crossflow.core.training.trainer import Trainer

LATENT, SIZE = (2, 4, 4), 16


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 64)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(features).unflatten(1, (2, *LATENT))


class Data:
    """Examples whose target says which one it is; the weight of some is 0 in places."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return torch.randn(35, generator=torch.Generator().manual_seed(key[1]))

    ahead = True
    in_workers = True

    def collate(self, examples: list[Tensor]) -> Record:
        return {"rows": torch.stack(examples)}

    def batch(self, record: Record) -> Batch:
        rows = record["rows"]
        target = rows[:, 3:].unflatten(1, LATENT)
        return Batch(rows[:, :3], target, weight=(target[:, :1] > -1).float())


@pytest.fixture
def objective(tiny_dit: Callable) -> Objective:
    torch.manual_seed(0)
    loss = {"encoder": "none", "kl_reduction": "sum", "kl_weight": 0.01}
    config = build(Config, {"task": "toy", "loss": loss, "guidance": {"drop": 0.2}})
    return Objective(CrossFlow(SourceEncoder(Trunk(), "variational", LATENT), tiny_dit(LATENT)), config)


@dataclass
class Step:
    """What a step comes to: losses, gradients, and the samples as the flow saw them."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
    unconditional: Tensor
    targets: Tensor


pytestmark = pytest.mark.forks


def step(objective: Objective, accumulate: int, rank: int = 0, world_size: int = 1) -> Step:
    """The step that the trainer makes of a process's parts, before gradients are averaged over processes."""
    size = SIZE // (accumulate * world_size)
    starts = [(part * world_size + rank) * size for part in range(accumulate)]
    samples = [range(start, start + size) for start in starts]
    data = Data()
    batches = [data.batch(data.collate([data[0, index] for index in part])) for part in samples]
    noises = [training_noise(0, 5, part, LATENT) for part in samples]
    drawn = objective.draw(batches, noises)
    losses: dict[str, Tensor] = {}
    for batch, noise in zip(drawn, noises, strict=True):
        values = objective(batch, noise)
        (values["loss"] / accumulate).backward()
        for name, value in values.items():
            losses[name] = losses.get(name, torch.zeros(())) + value.detach() / accumulate
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    flags = torch.cat([batch.unconditional for batch in drawn if batch.unconditional is not None])
    return Step(losses, gradients, flags, torch.cat([batch.target for batch in drawn]))


def assert_same(first: Step, second: Step) -> None:
    assert torch.equal(first.unconditional, second.unconditional)
    assert torch.equal(first.targets, second.targets)
    for name, value in first.losses.items():
        torch.testing.assert_close(second.losses[name], value, rtol=1e-5, atol=1e-6)
    for name, value in first.gradients.items():
        torch.testing.assert_close(second.gradients[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4, 8, 16])
def test_parts_make_the_step_of_the_whole_batch(objective: Objective, accumulate: int) -> None:
    whole = step(objective, 1)
    assert whole.unconditional.sum() > 2
    assert set(whole.losses) == {"loss", "flow", "kl"}
    objective.zero_grad()
    assert_same(whole, step(objective, accumulate))


def test_the_share_of_unconditional_samples_does_not_depend_on_accumulation(objective: Objective) -> None:
    noise = training_noise(0, 0, range(400), LATENT)
    batch = Batch(torch.zeros(400, 3), torch.zeros(400, *LATENT))
    parts = [batch[start : start + 4] for start in range(0, 400, 4)]
    noises = [replace(noise, source=noise.source[i : i + 4], time=noise.time[i : i + 4], drop=noise.drop[i : i + 4])
              for i in range(0, 400, 4)]  # fmt: skip
    drawn = objective.draw(parts, noises)
    share = torch.cat([part.unconditional for part in drawn if part.unconditional is not None]).float().mean()
    assert share.item() == pytest.approx((noise.drop < 0.2).float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_make_the_step_of_one(objective: Objective, tmp_path: Path, accumulate: int) -> None:
    whole = step(objective, 1)
    objective.zero_grad()
    first, second = (_in_process(objective, accumulate, rank, tmp_path) for rank in range(2))
    assert [os.waitpid(child, 0)[1] for child in (first, second)] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    def in_order(name: str) -> Tensor:
        parts = [result[name].chunk(accumulate) for result in results]
        return torch.cat([parts[rank][part] for part in range(accumulate) for rank in range(2)])

    means = {kind: {name: (results[0][kind][name] + results[1][kind][name]) / 2 for name in results[0][kind]}
             for kind in ("losses", "gradients")}  # fmt: skip
    assert_same(whole, Step(means["losses"], means["gradients"], in_order("unconditional"), in_order("targets")))


def _in_process(objective: Objective, accumulate: int, rank: int, folder: Path) -> int:
    """Forks a process that makes its share of the step and saves it; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            store = dist.FileStore(str(folder / "store"), 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
            torch.save(vars(step(objective, accumulate, rank, 2)), folder / f"{rank}.pt")
            dist.destroy_process_group()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return child


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_does_not_change_a_run(
    objective: Objective, tiny: ModuleType, tmp_path: Path, accumulate: int
) -> None:
    initial = {name: value.clone() for name, value in objective.state_dict().items()}
    for parts in (1, accumulate):
        objective.load_state_dict(initial)
        settings = tiny.config(batch_size=SIZE, steps=4, log_every=1, accumulate=parts)
        Trainer(
            settings, objective, Data(), run_dir=tmp_path / f"{parts}", seed=0, latent_shape=LATENT
        ).run()  # fmt: skip
    whole, divided = tiny.lines(tmp_path / "1"), tiny.lines(tmp_path / f"{accumulate}")
    for line, other in zip(whole, divided, strict=True):
        assert {**line, "kind": 0} == pytest.approx({**other, "kind": 0}, rel=1e-4)
