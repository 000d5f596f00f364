"""A training run of a second: a two-layer model on made-up data. Also a program, for tests that kill it."""

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from crossflow.core.batch import Batch
from crossflow.core.config import TrainConfig
from crossflow.core.distributed import gather_with_grad, is_main, on_main, rank, shared
from crossflow.core.errors import UserError
from crossflow.core.noise import Noise
from crossflow.core.settings import build
from crossflow.core.training import checkpoint as state
from crossflow.core.training.trainer import Callbacks, Trainer

LATENT = (3,)


class Data:
    """`num` examples that follow from their index, shifted by their epoch."""

    def __init__(self, num: int = 10, seconds: float = 0.0, bad: int | None = None) -> None:
        self.num, self.seconds, self.bad = num, seconds, bad
        self.seen: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        epoch, index = key
        self.seen.append(key)
        time.sleep(self.seconds)
        value = torch.tensor([index, epoch + 1, index * 0.5 - 1, 1.0]) / 10
        return value * float("nan") if index == self.bad else value

    ahead = True
    in_workers = True

    def collate(self, examples: list[Tensor]) -> dict[str, Tensor]:
        return {"features": torch.stack(examples)}

    def batch(self, record: dict[str, Tensor]) -> Batch:
        return Batch(features=record["features"], target=record["features"][:, :3].flip(1))


class Model(nn.Module):
    def __init__(self, num_blocks: int = 0) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Dropout(0.1), nn.Linear(8, 3))
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(num_blocks))
        self.source_encoder = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("table", torch.arange(3.0))


class Objective(nn.Module):
    """A flow-like loss with noise, and a contrastive one with a learned head over all ranks (when `contrastive`)."""

    def __init__(self, contrastive: bool = False, dropout: bool = True, num_blocks: int = 0) -> None:
        super().__init__()
        self.model = Model(num_blocks)
        if not dropout:
            self.model.backbone[2].p = 0.0
        self.head = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.0)) if contrastive else 1.0
        self.contrastive = contrastive
        self.leaves_parameters_out = True  # those called `unused`

    def draw(self, batches: Sequence[Batch], noises: Sequence[Noise]) -> list[Batch]:
        return list(batches)

    def forward(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        z0 = self.model.source_encoder(batch.features) + 0.1 * noise.source
        t = noise.time[:, None]
        velocity = self.model.backbone(t * batch.target + (1 - t) * z0)
        for block in self.model.blocks:
            velocity = velocity + block(velocity).tanh()
        flow = (velocity - (batch.target - z0)).square().mean()
        parts = {"flow": flow, "size": z0.square().mean() + self.head(z0).square().mean()}
        if self.contrastive:
            here = torch.arange(len(z0)) + rank() * len(z0)
            logits = self.scale * z0 @ gather_with_grad(self.head(batch.target)).T
            parts["encoder"] = nn.functional.cross_entropy(logits, here)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def config(**settings: object) -> TrainConfig:
    small = {
        "steps": 12,
        "batch_size": 4,
        "lr": 0.01,
        "warmup_steps": 3,
        "save_every": 4,
        "eval_every": 0,
        "log_every": 3,
    }
    return build(TrainConfig, {**small, "sample_every": 0, "ema": 0.9, **settings})


def trainer(run_dir: Path, objective: nn.Module | None = None, data: Data | None = None, **settings: object) -> Trainer:
    """`validate`, `sample`, `on_save`, `progress`, `seed` go to the trainer, the other settings to its config."""
    known = {name: settings.pop(name) for name in ("validate", "sample", "on_save", "progress") if name in settings}
    seed = int(settings.pop("seed", 0))  # type: ignore[call-overload]
    torch.manual_seed(seed)
    objective = objective or Objective()
    return Trainer(
        config(**settings),
        objective,
        Data() if data is None else data,
        run_dir=run_dir,
        seed=seed,
        latent_shape=LATENT,
        callbacks=Callbacks(**known),
    )


def lines(run_dir: Path, kind: str = "train") -> list[dict]:
    """The lines of metrics.jsonl without timings."""
    text = (run_dir / "metrics.jsonl").read_text()
    clock = ("seconds_per_step", "cpu_seconds_per_step", "samples_per_second", "data_seconds")
    read = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in read if line["kind"] == kind]


def everything(run_dir: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint and of the run directory."""
    files = [*state.checkpoints(run_dir / "checkpoints")[0].glob("*.safetensors"), *run_dir.glob("*.safetensors")]
    return {f"{file.parent.name}/{file.name}/{k}": v for file in files for k, v in load_file(file).items()}


def assert_same_run(run_dir: Path, other: Path) -> None:
    first, second = everything(run_dir), everything(other)
    assert len(first) > 20
    first = {name.replace(run_dir.name, ""): value for name, value in first.items()}
    second = {name.replace(other.name, ""): value for name, value in second.items()}
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []
    states = [
        json.loads((state.checkpoints(d / "checkpoints")[0] / "state.json").read_text()) for d in (run_dir, other)
    ]
    assert states[0] == states[1]


def noisy_validation(step: int) -> Mapping[str, float]:
    """Draws from every global generator, as a task may do by mistake."""
    return {"score": torch.rand(()).item() + random.random() + np.random.rand() + step}


def endless_validation(step: int) -> Mapping[str, float]:
    """Takes its time in each of two parts that processes share."""
    return {"parts": len(list(shared(range(2), lambda part: time.sleep(600))))}


def endless_samples(step: int) -> None:
    """Takes its time in the first process."""
    on_main(lambda: time.sleep(600))


class EndlessStep(Objective):
    """The second process never ends its seventh step."""

    def __init__(self, *settings: object) -> None:
        super().__init__(*settings)
        self.num_calls = 0

    def forward(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        self.num_calls += 1
        if self.num_calls == 7 and rank() == 1:
            time.sleep(600)
        return super().forward(batch, noise)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--contrastive", action="store_true")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--endless", choices=["validate", "sample", "step"])
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args()
    settings = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.settings)}
    torch.manual_seed(0)
    kind = EndlessStep if options.endless == "step" else Objective
    objective = kind(options.contrastive, not options.no_dropout, options.blocks)
    callbacks = {"validate": endless_validation, "sample": endless_samples}
    if options.endless in callbacks:
        settings[options.endless] = callbacks[options.endless]
    try:
        result = trainer(options.run_dir, objective, Data(seconds=options.seconds), **settings).run(options.resume)
    except UserError as error:
        sys.exit(f"user error: {error}")
    if is_main():
        (options.run_dir / "result.json").write_text(json.dumps([result.status, result.step, result.reason]))


if __name__ == "__main__":
    main()
