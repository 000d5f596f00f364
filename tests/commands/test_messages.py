"""Wrong input is answered in one paragraph with what is possible; nothing is lost."""

import shutil
from pathlib import Path

import pytest
import yaml

from crossflow.cli import main


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "'train'"),
        (["train"], "--task"),
        (["train", "--config", "t2i_tinny"], "t2i_tiny"),
        (["train", "--config", "nowhere/recipe.yaml"], "does not exist"),
        (["train", "--task", "sr", "--config", "t2i_tiny"], "'t2i'"),
        (["train", "--task", "sr", "train.stepz=3"], "train.steps"),
        (["train", "--task", "sr", "train.steps=many"], "train.steps = 'many'"),
        (["train", "--task", "sr", "train.steps"], "key=value"),
        (["train", "--task", "sr", "sample.solver=euller", "--dry-run"], "euler"),
        (["train", "--task", "sr", "backbone.size=huge", "--dry-run"], "tiny"),
        (["train", "--task", "sr", "sr.crop=30", "--dry-run"], "multiple"),
        (["train", "--task", "t2i", "--data", "skimage", "--dry-run"], "captions"),
        (["train", "--task", "t2i", "--data", "coco:nowhere", "--dry-run"], "nowhere"),
        (["train", "--task", "t2i", "--data", "cocoa:nowhere", "--dry-run"], "coco"),
        (["train", "--task", "t2i", "--resume", "auto"], "--output"),
        (["sample", "--checkpoint", "nowhere", "--prompt", "a"], "nowhere does not exist"),
        (["evaluate", "--checkpoint", "."], "not a run directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_messages_name_what_is_possible(refused, tmp_path: Path, monkeypatch, argv: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*argv)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task_is_refused(capsys, refused) -> None:
    assert main(["train", "--task", "t3i"]) == 2
    assert "'t2i'" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["tokenizer/tokenizer.json", "codec/codec.json"])
def test_a_damaged_run_is_neither_used_nor_resumed(refused, tiny_run, kept: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_run("t2i"), broken)
    (broken / kept).write_bytes((broken / kept).read_bytes()[:40])
    assert str(broken) in refused("sample", "--checkpoint", str(broken), "--prompt", "a cube")
    assert str(broken) in refused("train", "--output", str(broken), "--resume", "auto", "train.steps=3")


def test_checkpoints_that_do_not_fit_are_refused(refused, tiny_run, tmp_path: Path, photo: Path) -> None:
    assert "takes prompts" in refused("sample", "--checkpoint", str(tiny_run("t2i")), "--input", str(photo))
    assert "takes pictures" in refused("sample", "--checkpoint", str(tiny_run("sr")), "--prompt", "a red cube")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_run("sr"), broken)
    weights = broken / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused("sample", "--checkpoint", str(broken), "--input", str(photo))
    settings = yaml.safe_load((broken / "config.yaml").read_text())
    settings["backbone"]["width"] = 32
    (broken / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "does not fit" in refused("sample", "--checkpoint", str(broken), "--weights", "model", "--input", str(photo))
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_run("sr"), mixed)
    shutil.copy(tiny_run("depth") / "ema.safetensors", mixed / "ema.safetensors")
    assert "does not fit" in refused("sample", "--checkpoint", str(mixed), "--input", str(photo))


def test_unreadable_inputs_are_refused_by_name(refused, tiny_run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    run = str(tiny_run("depth"))
    assert "bad.png" in refused("sample", "--checkpoint", run, "--input", str(bad))
    assert "bad.png" in refused("interpolate", "--checkpoint", run, "--from", str(bad), "--to", str(bad))
    for name in ("none.png", "bad.png"):
        error = refused("invert", "--checkpoint", run, "--input", str(tmp_path / name))
        assert f"{name} cannot be inverted" in error
    latin = tmp_path / "prompts.txt"
    latin.write_bytes("ein grüner Würfel".encode("latin-1"))
    assert "UTF-8" in refused("sample", "--checkpoint", str(tiny_run("t2i")), "--prompts", str(latin))
    assert "unavailable" in refused("evaluate", "--checkpoint", run, "--device", "gpu7")


def test_an_unknown_solver_is_refused_with_near_names(refused, tiny_run) -> None:
    error = refused("sample", "--checkpoint", str(tiny_run("t2i")), "--prompt", "a cube", "--solver", "eulr")
    assert "'euler'" in error


def test_a_missing_prompt_is_noticed_before_the_model_is_loaded(refused, monkeypatch) -> None:
    monkeypatch.setattr("crossflow.engine.sample.load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert "--prompt" in refused("sample", "--checkpoint", "runs/t2i")


def test_settings_of_sampling_are_written_without_their_section(refused, tiny_run) -> None:
    argv = ["sample", "--checkpoint", str(tiny_run("t2i")), "--prompt", "a cube"]
    assert "write --steps VALUE zero_init=VALUE" in refused(*argv, "sample.steps=5", "sample.zero_init=1")


@pytest.mark.parametrize("option", [["--seed", "-1"], ["--steps", "0"], ["--num", "0"], ["--nonsense"]])
def test_impossible_options_are_refused_in_the_same_form(refused, option: list[str]) -> None:
    error = refused("sample", "--checkpoint", "run", "--prompt", "a", *option)
    assert option[0] in error
    assert "See `crossflow sample --help`." in error


@pytest.mark.parametrize("argv", [["--debug", "train"], ["train", "--debug"]])
def test_debug_shows_the_traceback_behind_a_message(capsys, argv: list[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("error: Neither a task nor a recipe is given.")


def test_debug_can_be_set_by_the_environment(capsys, monkeypatch) -> None:
    monkeypatch.setenv("CROSSFLOW_DEBUG", "1")
    assert main(["train"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_file_counts_are_grammatical(tiny_run, tmp_path: Path, capsys) -> None:
    argv = ["sample", "--checkpoint", str(tiny_run("t2i")), "--prompt", "a cube", "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    assert "Wrote 1 file to" in capsys.readouterr().out


def test_summaries_of_commands_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_choices_of_a_missing_argument_are_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
