"""A folder belongs to one run at a time, whatever starts the second."""

from pathlib import Path

import pytest

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.lock import FolderLock
from crossflow.engine.train import Run, train
from crossflow.tasks import load_config

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tiny_settings):
    return load_config("sr_tiny", tiny_settings("sr"))


@pytest.mark.parametrize("resume", ["auto", None])
def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(config, tmp_path: Path, resume: str | None) -> None:
    folder = tmp_path / "run"
    first = Run.open(config, folder)
    with pytest.raises(UserError, match="in use by process"):
        train(config, folder, resume=resume)
    assert first.train().result.step == 2
    assert not list(folder.rglob(".*"))


def test_a_failed_run_unlocks_its_folder(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("crossflow.engine.train.Trainer", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with FolderLock(tmp_path / "run"):
        pass


def test_two_evaluations_do_not_write_to_one_folder(tiny_run, tmp_path: Path, capsys) -> None:
    argv = ["evaluate", "--checkpoint", str(tiny_run("sr")), "--num", "2", "--output", str(tmp_path / "scores")]
    with FolderLock(tmp_path / "scores"):
        assert main(argv) == 2
        assert "in use by process" in capsys.readouterr().err
    assert main(argv) == 0
    assert not list((tmp_path / "scores").rglob(".lock"))
