"""Learning in equal time: what arguments mean, and curves of the recipes that were trained."""

import json
from pathlib import Path

import pytest

from crossflow.benchmarks.learning import Budget, Entry, compare, entries
from crossflow.cli import main
from crossflow.core.errors import UserError

SMALL = ["data.num_train=8", "data.image_size=32", "train.batch_size=4", "backbone.width=32", "backbone.depth=1"]


def test_settings_belong_to_all_recipes_or_to_the_labelled_one() -> None:
    first, second = entries(["sr_tiny", "wide:sr_tiny", "wide:backbone.width=64", "train.lr=1e-3"])
    assert first == Entry("sr_tiny", "sr_tiny", ("train.lr=1e-3",))
    assert second == Entry("wide", "sr_tiny", ("backbone.width=64", "train.lr=1e-3"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr=1"], "at least one recipe"),
        (["sr_tiny", "sr_tiny"], "used twice"),
        (["sr_tiny", "wide:train.lr=1"], "not among the recipes, which are sr_tiny"),
    ],
)
def test_arguments_without_meaning_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        entries(arguments)


def test_the_time_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "learning", "sr_tiny"]) == 2
    assert "--minutes or --cpu-minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_recipes_are_trained_in_equal_time_and_the_comparison_continues(tmp_path: Path) -> None:
    lines: list[str] = []
    budget = Budget(minutes=0.02, clock="cpu minutes", num_points=2, num_items=2)
    chosen = entries(["sr_tiny", "faster:sr_tiny", "faster:train.batch_size=2", *SMALL])
    compare(chosen[:1], budget, tmp_path, lines.append)
    log = tmp_path / "runs/sr_tiny-seed0/metrics.jsonl"
    before = log.read_bytes()
    markdown, _ = compare(chosen, budget, tmp_path, lines.append)
    assert log.read_bytes() == before  # a finished training is not repeated
    results = json.loads((tmp_path / "learning.json").read_text())
    for label, recipe in results["recipes"].items():
        assert recipe["cpu_minutes"] == pytest.approx(0.02, rel=1.5)
        curve = results["curves"]["val/psnr_y"][f"{label}-seed0"]
        assert len(curve) == 2
        assert curve[0][0] < curve[1][0] == pytest.approx(recipe["cpu_minutes"])
        assert curve[1][1] == pytest.approx(recipe["scores"]["psnr_y"]["mean"])
        assert f"| {label}" in markdown.read_text()
    with pytest.raises(UserError, match=r"minutes 0\.02 -> 1"):
        compare(chosen, Budget(minutes=1, clock="cpu minutes", num_points=2, num_items=2), tmp_path, lines.append)
