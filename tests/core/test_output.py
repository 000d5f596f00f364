"""Results are written where nothing lies; overwriting removes earlier results and nothing else."""

from pathlib import Path

import pytest

from crossflow.core.errors import UserError
from crossflow.core.output import RECORD, check_output, claim, output_folder


def write_results(default: Path, requested: Path | None = None, *names: str, overwrite: bool = False) -> Path:
    with output_folder(default, requested, overwrite=overwrite) as folder:
        for name in names or ("a.png",):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("result")
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {RECORD}


def fail_after_writing(folder: Path, *names: str) -> None:
    def write() -> None:
        with output_folder(folder):
            for name in names:
                (folder / name).write_text("half")
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError):
        write()


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    folders = [write_results(tmp_path / "out") for _ in range(3)]
    assert [folder.name for folder in folders] == ["out", "out-2", "out-3"]


def test_an_empty_default_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert write_results(tmp_path / "out") == tmp_path / "out"


def test_a_requested_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        check_output(tmp_path / "mine")
    with pytest.raises(UserError, match="--overwrite"):
        write_results(tmp_path / "out", tmp_path / "mine")
    assert names(tmp_path / "mine") == {"thesis.txt"}


def test_overwriting_removes_earlier_results_and_keeps_other_files(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "out", None, "a.png", "b.png", "pages/c.png")
    (folder / "notes.txt").write_text("precious")
    assert write_results(tmp_path / "out", folder, "a.png", overwrite=True) == folder
    assert names(folder) == {"a.png", "notes.txt"}
    assert not (folder / "pages").exists()
    assert write_results(tmp_path / "out", None, "d.png", overwrite=True) == folder
    assert names(folder) == {"d.png", "notes.txt"}


def test_files_of_a_failed_command_are_recorded_and_an_empty_folder_is_removed(tmp_path: Path) -> None:
    fail_after_writing(tmp_path / "out", "a.png")
    write_results(tmp_path / "out", tmp_path / "out", "b.png", overwrite=True)
    assert names(tmp_path / "out") == {"b.png"}
    fail_after_writing(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_unfinished_work_is_continued_and_other_work_is_left_alone(tmp_path: Path) -> None:
    first = claim(tmp_path / "out")
    (first / "unfinished").write_text("mine")
    assert claim(tmp_path / "out", resumable=lambda folder: (folder / "unfinished").read_text() == "mine") == first
    assert claim(tmp_path / "out", resumable=lambda folder: False).name == "out-2"


def test_a_record_cannot_remove_files_outside_its_folder(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "out")
    (tmp_path / "outside.txt").write_text("precious")
    (folder / RECORD).write_text('{"files": ["../outside.txt"]}')
    write_results(tmp_path / "out", folder, overwrite=True)
    assert (tmp_path / "outside.txt").read_text() == "precious"


def test_a_requested_file_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="exists"):
        check_output(tmp_path / "a.json")
    check_output(tmp_path / "a.json", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        claim(tmp_path / "out", tmp_path / "a.json", overwrite=True)
