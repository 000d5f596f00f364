"""A loss or gradient that is not finite never reaches the weights; it is counted, its batch is listed."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossflow.core.batch import Batch
from crossflow.core.errors import UserError
from crossflow.core.training.optim import build_optimizer, skip_if

NAN = float("nan")


def breaking(tiny: ModuleType, folder: Path, bad: set[int], how: str = "loss", **settings: object) -> Any:
    """A trainer whose loss or gradient is not finite in the steps `bad`, counted from 1."""

    class Breaking(tiny.Objective):  # type: ignore[misc, name-defined]
        def forward(self, batch: object, noise: object) -> dict[str, Tensor]:
            losses = super().forward(batch, noise)
            if trainer.step + 1 in bad:
                if how == "part":  # whose weight is 0
                    losses["size"] = losses["size"] + float("inf")
                elif how == "loss":
                    losses = {name: value * NAN for name, value in losses.items()}
                else:  # the square root has an infinite slope at 0
                    losses["loss"] = losses["loss"] + (self.head.weight * 0).abs().sum().sqrt()
            return losses

    torch.manual_seed(0)
    trainer = tiny.trainer(folder, Breaking(), Named(tiny.Data()), **settings)
    return trainer


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]


class Named:
    """Data whose items have names."""

    def __init__(self, data: object) -> None:
        self.data = data

    ahead = True
    in_workers = True

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[str, Tensor]:
        return f"item{key[1]}", self.data[key]

    def collate(self, examples: list[tuple[str, Tensor]]) -> dict:
        return {**self.data.collate([value for _, value in examples]), "ids": tuple(name for name, _ in examples)}

    def batch(self, record: dict) -> Batch:
        return replace(self.data.batch(record), ids=record["ids"])


@pytest.mark.parametrize("how", ["loss", "gradient", "part"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_is_left_out_counted_and_listed(tiny: ModuleType, tmp_path: Path, how: str, optimizer: str) -> None:
    settings = {"max_bad_steps": 2, "optimizer": optimizer, "accumulate": 2, "log_every": 4, "save_every": 50}
    trainer = breaking(tiny, tmp_path, {6, 8}, how, **settings)
    before = []
    original = trainer._train_step

    def train_step(parts: object) -> None:
        before.append({name: value.clone() for name, value in trainer.learner.tensors()["optimizer"].items()})
        before[-1] |= {name: value.clone() for name, value in trainer.learner.model.state_dict().items()}
        original(parts)

    trainer._train_step = train_step
    assert trainer.run().status == "finished"
    changed = [any(not torch.equal(x, y[name]) for name, x in w.items()) for w, y in itertools.pairwise(before)]
    assert changed == [step not in (6, 8) for step in range(1, 12)]
    assert [line.get("skipped_steps", 0) for line in tiny.lines(tmp_path)] == [0, 2, 2]
    assert all(torch.tensor(line["loss"]).isfinite() for line in tiny.lines(tmp_path))
    rows = listed(tmp_path)
    assert [row["step"] for row in rows] == [6, 8]
    assert ("size" in rows[0]["not_finite"], "gradient norm" in rows[0]["not_finite"]) == (how != "gradient", True)
    (process,) = rows[0]["processes"]
    size = process["losses"]["size"]
    assert size == {"loss": "nan", "part": "inf", "gradient": pytest.approx(size)}[how]
    assert process["ids"] == [f"item{index}" for _, index in trainer.data.examples_at(range(20, 24))]


def test_means_leave_out_bad_steps(tiny: ModuleType, tmp_path: Path) -> None:
    breaking(tiny, tmp_path / "bad", {4}, steps=4, log_every=4, max_bad_steps=2).run()
    breaking(tiny, tmp_path / "good", set(), steps=4, log_every=3).run()
    means, expected = tiny.lines(tmp_path / "bad")[0], tiny.lines(tmp_path / "good")[0]
    for name in ("loss", "grad_norm", "unconditional"):
        assert means[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize(("limit", "stops_at"), [(1, 3), (2, 7), (3, 11)])
def test_too_many_bad_steps_in_a_row_end_the_run(tiny: ModuleType, tmp_path: Path, limit: int, stops_at: int) -> None:
    bad = {3, 6, 7, 9, 10, 11}
    message = rf"at step {stops_at}: not finite.*in a batch of item\d.*max_bad_steps"
    with pytest.raises(UserError, match=message) as caught:
        breaking(tiny, tmp_path, bad, max_bad_steps=limit).run()
    assert (f"({limit} steps in a row)" in str(caught.value)) == (limit > 1)
    assert [row["step"] for row in listed(tmp_path)] == sorted(step for step in bad if step <= stops_at)


def test_a_resumed_run_counts_on_and_repeats_no_line(tiny: ModuleType, tmp_path: Path) -> None:
    settings = {"max_bad_steps": 3, "save_every": 7, "log_every": 1}
    whole, parts, bad = tmp_path / "whole", tmp_path / "parts", {3, 6, 7, 8}
    with pytest.raises(UserError, match="3 steps in a row"):
        breaking(tiny, whole, bad, **settings).run()
    breaking(tiny, parts, bad, steps=7, **settings).run()
    with pytest.raises(UserError, match="3 steps in a row"):
        breaking(tiny, parts, bad, **settings).run("auto")
    assert listed(whole) == listed(parts)
    assert tiny.lines(whole) == tiny.lines(parts)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_device_decides_about_an_update(name: str) -> None:
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)])
    optimizer = build_optimizer(module, name=name, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    for gradient, skip in ((0.5, 0.0), (NAN, 1.0), (float("inf"), 1.0), (0.5, 0.0)):
        before = [parameter.clone() for parameter in module.parameters()]
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        assert skip_if(optimizer, torch.tensor(skip))
        optimizer.step()
        same = [torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True)]
        assert all(same) if skip else not any(same)


def test_an_optimizer_that_cannot_skip_says_so() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, scaled=True)
    assert not skip_if(optimizer, torch.tensor(1.0))
