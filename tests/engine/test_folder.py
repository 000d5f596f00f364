"""The run directory: its files, and the return to what was there before."""

import doctest
from pathlib import Path

import pytest

from crossflow.engine import folder as module
from crossflow.engine.folder import RunFolder, new_folder


def test_the_docstring_example_runs() -> None:
    assert doctest.testmod(module).failed == 0


def test_the_last_step_is_that_of_the_newest_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (9, 100, 20):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".part-step_00000200").mkdir()
    assert run.last_step == 100


def test_a_missing_or_damaged_manifest_reads_as_empty(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_manifest() == {}
    for text in ("[1]", "{"):
        (tmp_path / "manifest.json").write_text(text)
        assert run.read_manifest() == {}
    run.write_manifest({"task": "sr"})
    assert run.read_manifest() == {"task": "sr"}


@pytest.mark.parametrize("progress", ["model.safetensors", "metrics.jsonl", "checkpoints/step_00000001/weights"])
def test_restoring_keeps_the_files_of_a_training(tmp_path: Path, progress: str) -> None:
    run = RunFolder(tmp_path / "run")
    before = run.snapshot()
    (run.path / progress).parent.mkdir(parents=True)
    (run.path / progress).write_text("{}\n")
    before.restore()
    assert (run.path / progress).is_file()


def test_existing_names_are_numbered(tmp_path: Path) -> None:
    assert new_folder(tmp_path, "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").touch()
    assert new_folder(tmp_path, "run") == tmp_path / "run-3"
