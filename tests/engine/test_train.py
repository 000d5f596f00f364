"""A training leaves a complete run directory, or what was there before; a finished one is not repeated."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.core.training.trainer import Trainer
from crossflow.engine import train as training
from crossflow.engine.folder import RunFolder
from crossflow.engine.train import Run, TrainingSet, dry_run, finished, train
from crossflow.tasks import load_config, task_class, task_names
from crossflow.tasks.base import Task


@pytest.fixture
def config(tiny_settings):
    """config(*overrides): the configuration of a run of two steps on a super-resolution task."""
    return lambda *overrides: load_config("sr_tiny", [*tiny_settings("sr"), *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


FAILURES = {
    "preparation": lambda patch: patch.setattr(Task, "accept", interrupt),
    "model": lambda patch: patch.setattr(training, "_build_objective", interrupt),
    "first step": lambda patch: patch.setattr(Trainer, "_train_step", interrupt),
}


@pytest.mark.parametrize("stage", FAILURES)
def test_a_failed_training_leaves_no_folder(config, stage: str, tmp_path: Path, monkeypatch) -> None:
    FAILURES[stage](monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", FAILURES)
def test_a_failed_training_keeps_what_the_folder_held(config, stage: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "today.txt").write_text("mine")
    (tmp_path / "config.txt").write_text("mine too")
    before = contents(tmp_path)
    FAILURES[stage](monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path)
    assert contents(tmp_path) == before


def test_invalid_settings_leave_no_folder(config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learned nothing"):
        train(config("source.frozen=true"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failure_after_a_checkpoint_keeps_the_run(config, tmp_path: Path, monkeypatch) -> None:
    settings = config("train.steps=4", "train.save_every=1")
    step = Trainer._train_step

    def fails_at_the_third(trainer: Trainer, micro_batches: object) -> None:
        if trainer.step == 2:
            raise KeyboardInterrupt
        step(trainer, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", fails_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "run")
    assert finished(settings, tmp_path / "run") is None
    assert RunFolder(tmp_path / "run").last_step == 2
    outcome = train(settings, tmp_path / "run", resume="auto")
    assert outcome.result.step == 4
    assert not outcome.already_finished


@pytest.mark.slow
def test_a_finished_run_is_neither_trained_nor_scored_again(config, tmp_path: Path, monkeypatch) -> None:
    first = train(config(), tmp_path / "run")
    before = contents(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "open", interrupt)
        again = train(config(), tmp_path / "run", resume="auto")
    assert again.already_finished
    assert again.result.step == 2
    assert again.scores.values == first.scores.values
    assert again.scores.intervals == first.scores.intervals
    assert again.baseline == first.baseline
    assert contents(tmp_path / "run") == before
    with pytest.raises(UserError, match=r"other settings: train\.lr"):
        train(config("train.lr=0.5"), tmp_path / "run", resume="auto")
    longer = train(config("train.steps=3"), tmp_path / "run", resume="auto")
    assert longer.result.step == 3
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["step"] == 3


@pytest.mark.slow
def test_a_run_that_was_not_scored_is_not_finished(config, tmp_path: Path) -> None:
    train(config(), tmp_path / "run")
    (tmp_path / "run" / "scores.json").unlink()
    assert finished(config(), tmp_path / "run") is None
    assert train(config(), tmp_path / "run", resume="auto").scores is not None


@pytest.mark.slow
def test_a_second_run_does_not_replace_the_first(config, tmp_path: Path) -> None:
    train(config(), tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"already holds a run.*`crossflow train --output \S+ --resume auto"):
        train(config(), tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_dry_run_writes_nothing(config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    report = dry_run(config())
    assert report.parameters["backbone"] > 0
    assert report.seconds_per_step > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", task_names())
def test_a_loader_worker_gets_no_weights_and_makes_the_same_records(tiny_run, name: str) -> None:
    config = load_config(tiny_run(name))
    task = task_class(name).load(config, tiny_run(name))
    here = TrainingSet(task.dataset(config, "train"), task)
    there = pickle.loads(pickle.dumps(here))  # as to a process that is not forked
    weights = [tensor for network in there.task.networks for tensor in network.state_dict().values()]
    assert all(weight.is_meta for weight in weights)
    assert not any(tensor.is_meta for network in task.networks for tensor in network.state_dict().values())
    places = [(0, 1), (1, 5), (0, 7)]
    record, of_worker = (data.collate(data.__getitems__(places)) for data in (here, there))
    assert record.keys() == of_worker.keys()
    for key, value in record.items():
        assert torch.equal(value, of_worker[key]) if isinstance(value, torch.Tensor) else value == of_worker[key]
    assert here.batch(record).target.shape == (3, *task.latent_shape)
