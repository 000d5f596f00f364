"""A training run of a second: a two-layer model on made-up data. Also a program, for tests that kill it."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from crossflow.core.batch import Batch
from crossflow.core.config import TrainConfig, build
from crossflow.core.distributed import gather_with_grad, is_main, rank
from crossflow.core.errors import UserError
from crossflow.core.noise import Noise
from crossflow.core.training.trainer import Trainer

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

    def collate(self, examples: list[Tensor]) -> Batch:
        features = torch.stack(examples)
        return Batch(features=features, target=features[:, :3].flip(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Dropout(0.1), nn.Linear(8, 3))
        self.source_encoder = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("table", torch.arange(3.0))


class Objective(nn.Module):
    """A flow-like loss with noise, and a contrastive one with a learned head over all ranks (when `contrastive`)."""

    def __init__(self, contrastive: bool = False, dropout: bool = True) -> None:
        super().__init__()
        self.model = Model()
        if not dropout:
            self.model.backbone[2].p = 0.0
        self.head = nn.Linear(3, 3)
        self.contrastive = contrastive

    def forward(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        z0 = self.model.source_encoder(batch.features) + 0.1 * noise.source
        t = noise.time[:, None]
        velocity = self.model.backbone(t * batch.target + (1 - t) * z0)
        flow = (velocity - (batch.target - z0)).square().mean()
        parts = {"flow": flow, "size": z0.square().mean() + self.head(z0).square().mean()}
        if self.contrastive:
            here = torch.arange(len(z0)) + rank() * len(z0)
            logits = z0 @ gather_with_grad(self.head(batch.target)).T
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
        config(**settings), objective, data or Data(), run_dir=run_dir, seed=seed, latent_shape=LATENT, **known
    )


def lines(run_dir: Path, kind: str = "train") -> list[dict]:
    """The lines of metrics.jsonl without what a clock decides."""
    text = (run_dir / "metrics.jsonl").read_text()
    clock = ("seconds_per_step", "samples_per_second")
    read = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in read if line["kind"] == kind]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--contrastive", action="store_true")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args()
    settings = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.settings)}
    torch.manual_seed(0)
    objective = Objective(options.contrastive, not options.no_dropout)
    try:
        result = trainer(options.run_dir, objective, Data(seconds=options.seconds), **settings).run(options.resume)
    except UserError as error:
        sys.exit(f"user error: {error}")
    if is_main():
        (options.run_dir / "result.json").write_text(json.dumps([result.status, result.step, result.reason]))


if __name__ == "__main__":
    main()
