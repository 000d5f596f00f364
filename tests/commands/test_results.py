"""Commands write where nothing lies, or replace earlier results when told to."""

import json
from pathlib import Path

import pytest

from crossflow.cli import main

COMMANDS = {
    "sample": ["--prompt", "a red cube"],
    "interpolate": ["--from", "a red cube", "--to", "a ball", "--frames", "2"],
    "arithmetic": ["--base", "a red cube", "--plus", "a ball"],
}


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("command", COMMANDS)
def test_default_folders_are_numbered(tiny_run, tmp_path: Path, monkeypatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [command, "--checkpoint", str(tiny_run("t2i")), *COMMANDS[command]]
    assert main(argv) == 0
    (folder,) = Path("outputs").iterdir()
    before = files(folder)
    assert main([*argv, "--seed", "1"]) == 0
    assert files(folder) == before
    assert {path.name for path in Path("outputs").iterdir()} == {folder.name, f"{folder.name}-2"}


def test_an_output_with_results_is_refused_or_overwritten(tiny_run, tmp_path: Path, refused) -> None:
    folder = tmp_path / "out"
    argv = ["sample", "--checkpoint", str(tiny_run("t2i")), "--output", str(folder), "--prompt", "a red cube"]
    assert main([*argv, "--num", "3"]) == 0
    (folder / "notes.txt").write_text("keep me")
    before = files(folder)
    assert "--overwrite" in refused(*argv)
    assert files(folder) == before
    assert main([*argv, "--overwrite"]) == 0
    assert {path.name for path in folder.glob("[!.]*")} == {"0000.png", "notes.txt"}


def test_an_occupied_output_is_refused_before_the_model_is_loaded(tmp_path: Path, refused, monkeypatch) -> None:
    monkeypatch.setattr("crossflow.engine.sample.load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file.txt").write_text("")
    for command, options in COMMANDS.items():
        assert "not empty" in refused(command, "--checkpoint", "run", *options, "--output", str(tmp_path))
    target = tmp_path / "file.txt"
    assert "exists" in refused("statistics", "--protocol", "coco-fid30k", "--data", "scenes", "--output", str(target))
    assert "exists" in refused("benchmark", "speed", "--output", str(target))
    assert "not empty" in refused("benchmark", "quality", "--runs", str(tmp_path), "--output", str(tmp_path))


@pytest.mark.slow
def test_a_shorter_evaluation_keeps_a_longer_one(tiny_run, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_run("sr"), run)
    for num in ("4", "2", "2"):
        assert main(["evaluate", "--checkpoint", str(run), "--num", num]) == 0
    numbers = {
        path.parent.name: json.loads(path.read_text())["scores"]["num_items"]
        for path in run.glob("evaluation/*/metrics.json")
    }
    name = min(numbers)
    assert numbers == {name: 4, f"{name}-2": 2, f"{name}-3": 2}


def test_a_second_data_check_keeps_the_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", "scenes", "--split", "val", "--num", "3"]) == 0
    assert main(["data", "check", "scenes", "--split", "test", "--num", "3"]) == 0
    assert {path.name for path in Path("outputs").iterdir()} == {"data", "data-2"}
    assert not (tmp_path / "outputs" / "data" / "test.json").exists()


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        ("sample", "outputs/TASK"),
        ("interpolate", "outputs/interpolate"),
        ("arithmetic", "outputs/arithmetic"),
        ("invert", "outputs/invert"),
        ("evaluate", "RUN/evaluation/NAME"),
        ("data check", "outputs/data"),
        ("benchmark quality", "quality"),
        ("train", "runs/RECIPE"),
        ("ablate", "ablations/GROUP"),
    ],
)
def test_help_names_the_default_folder(capsys, command: str, folder: str) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"Default: {folder}" in " ".join(capsys.readouterr().out.split())
