"""The plan of a training says what is measured afterwards."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from crossflow.core.files import size_in_words
from crossflow.core.training.memory import LiveBytes
from crossflow.engine.folder import RunFolder
from crossflow.engine.health.machine import Device
from crossflow.engine.health.plan import examine_plan, plan
from crossflow.engine.train import Run
from crossflow.tasks import load_config, task_class

ROOMY = Device("cpu", 10**13, None, True)


def allocated(run: Run) -> int:
    """The most bytes that torch's CPU allocator holds in the second step, with all that a run keeps."""
    trainer = run.trainer()
    steps = trainer.trial(2)
    next(steps)
    learner = trainer.learner
    kept = [*learner.objective.parameters(), *learner.objective.buffers(), *learner.ema.shadows]
    held = sum(tensor.nbytes for tensor in (*kept, *learner.tensors()["optimizer"].values()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        next(steps)
    peak = now = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return held + peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("sr_tiny", []),
        ("depth_tiny", ["train.precision=no", "train.batch_size=16", "train.accumulate=2"]),
        ("t2i_tiny", ["train.batch_size=16"]),
    ],
)
def test_memory_and_checkpoint_are_within_ten_percent(recipe: str, overrides: list[str], tmp_path: Path) -> None:
    config = load_config(recipe, [*overrides, "data.num_train=64", "train.log_every=1000"])
    planned = plan(config)
    run = Run.open(config, tmp_path / "run")
    assert planned.peak == pytest.approx(allocated(run), rel=0.1)
    run.trainer().save()
    (checkpoint,) = RunFolder(run.folder).checkpoints
    files = sum(path.stat().st_size for path in checkpoint.iterdir())
    # A checkpoint before the first step has no state of the optimizer yet.
    assert planned.checkpoint is not None
    assert planned.checkpoint - planned.memory["optimizer"] == pytest.approx(files, rel=0.1)
    assert sum(planned.memory.values()) == planned.peak


def test_a_plan_without_data_says_why(tmp_path: Path) -> None:
    config = load_config("depth_tiny", [f"data.train=folder:{tmp_path}/none"])
    planned = plan(config)
    assert (planned.num_train, planned.num_val, planned.checkpoint) == (None, None, None)
    (problem,) = examine_plan(planned, ROOMY, 10**13)
    assert problem.name == "data"
    assert f"{tmp_path}/none" in problem.sentence
    assert "activations" not in planned.memory


@pytest.mark.slow
def test_what_does_not_fit_is_said(tiny_settings) -> None:
    planned = plan(load_config("sr_tiny", [*tiny_settings("sr"), "train.batch_size=32"]))
    assert examine_plan(planned, ROOMY, 10**13)[0].name == "small data"  # 24 items
    small = Device("cpu", planned.peak - 1, None, True)
    memory, disk = examine_plan(planned, small, planned.disk_bytes - 1)[1:]
    assert f"A step takes {size_in_words(planned.peak)}, and cpu has" in memory.sentence
    assert f"3 checkpoints take {size_in_words(planned.disk_bytes)}" in disk.sentence


@pytest.mark.slow
def test_processes_and_parts_divide_the_activations(tiny_settings) -> None:
    config = load_config("sr_tiny", [*tiny_settings("sr"), "train.batch_size=16"])
    whole, shared = plan(config), plan(config, num_processes=2)
    assert shared.memory["activations"] < 0.8 * whole.memory["activations"]
    assert shared.memory["weights"] == whole.memory["weights"]
    parts = plan(load_config("sr_tiny", [*tiny_settings("sr"), "train.batch_size=16", "train.accumulate=4"]))
    assert parts.memory["activations"] < 0.5 * whole.memory["activations"]


@pytest.mark.slow
def test_recomputed_activations_take_less(tiny_settings) -> None:
    settings = [*tiny_settings("sr"), "train.batch_size=16", "backbone.depth=6"]
    plain, again = (
        plan(load_config("sr_tiny", [*settings, f"train.checkpointing={word}"])) for word in ("false", "true")
    )
    assert again.memory["activations"] < 0.7 * plain.memory["activations"]


@pytest.mark.slow
def test_eight_bit_averages_take_two_bytes_per_parameter(tiny_settings) -> None:
    settings = ["backbone.width=128"]
    adamw = plan(load_config("sr_tiny", [*tiny_settings("sr"), *settings, "train.optimizer=adamw"]))
    eight_bit = plan(load_config("sr_tiny", [*tiny_settings("sr"), *settings, "train.optimizer=adamw8bit"]))
    assert 0.24 < eight_bit.memory["optimizer"] / adamw.memory["optimizer"] < 0.35  # small parameters stay in float32
    assert eight_bit.memory["weights"] == adamw.memory["weights"]


def test_views_and_results_in_place_are_counted_once() -> None:
    with LiveBytes() as memory:
        first = torch.zeros(1000)
        view = first.view(10, 100)[2:]
        view.add_(1)
        second = first + 1
        assert memory.live == 8000
        del first, view
        assert memory.live == 4000
        del second
    assert (memory.live, memory.peak) == (0, 8000)


def test_every_task_is_planned_in_short() -> None:
    for name in ("sr_tiny", "caption_tiny"):
        config = load_config(name)
        quick = load_config(name, task_class(config.task).quick)
        assert plan_sizes(quick) == plan_sizes(config)


def plan_sizes(config) -> dict[str, int]:
    from crossflow.engine.train import estimate

    return estimate(config).memory
