"""What scripts and shells get: JSON alone on stdout, completion, first lines, near names, the viewer of the desktop."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from crossflow.cli import main, table
from crossflow.core.output import planned
from crossflow.engine.sample import load

RUNS = Path(__file__).parents[1] / "golden" / "runs"


@pytest.fixture
def as_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """as_json(*argv): what a command with --json prints to stdout, which must be JSON and nothing else."""

    def run(*argv: str) -> Any:
        capsys.readouterr()
        assert main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_show_says_what_a_run_is(as_json, capsys) -> None:
    content = as_json("show", str(RUNS / "sr"))
    assert (content["task"], content["recipe"], content["step"]) == ("sr", "sr_tiny", 4)
    assert content["differences"]["train.steps"] == {"recipe": 1600, "run": 4}
    assert content["parameters"] == {"backbone": 11568}
    (validation,) = content["measurements"]
    assert validation["scores"]["psnr_y"] == pytest.approx(27.96, abs=0.01)
    assert content["manifest"]["git"] == "228bb90"
    assert main(["show", str(RUNS / "sr")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "20 settings differ from the recipe sr_tiny" in text
    assert "train.steps 4 recipe: 1600" in text
    assert "psnr_y 27.96 25.92 to 29.47" in text
    assert main(["show", str(RUNS / "sr"), "--open"]) == 2
    assert "no pictures of its training to open" in capsys.readouterr().err


def test_a_listing_of_samples_names_their_files(as_json, tmp_path: Path) -> None:
    argv = ["sample", "--checkpoint", str(RUNS / "t2i"), "--prompt", "a cube", "--num", "2", "--output", str(tmp_path)]
    content = as_json(*argv)
    assert [result["item"] for result in content["results"]] == ["a cube/0", "a cube/1"]
    assert [Path(*result["files"]).is_file() for result in content["results"]] == [True, True]


def test_comparisons_findings_and_names_are_json(as_json, tmp_path: Path) -> None:
    manifest = {"task": "sr", "seed": 0, "data": {"spec": "a", "split": "test"}}
    for name, score in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        content = {"scores": {"psnr": score}, "manifest": manifest | {"seed": int(score)}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    content = as_json("compare", str(tmp_path / "first"), str(tmp_path / "second"))
    assert content["scores"] == [{"score": "psnr", "first": 1.0, "second": 2.0, "verdict": ""}]
    assert list(content["differences"].values()) == [["seed: 1 -> 2"]]
    (examined,) = as_json("doctor", str(RUNS / "sr"), "--no-measuring")
    assert examined["facts"]["step"] == "4 of 4"
    assert {finding["severity"] for finding in examined["findings"]} <= {"problem", "warning"}
    assert "euler" in [row["name"] for row in as_json("list", "solvers")]


@pytest.mark.slow
def test_an_evaluation_prints_its_scores_as_json(as_json, tmp_path: Path) -> None:
    content = as_json("evaluate", "--checkpoint", str(RUNS / "sr"), "--num", "2", "--output", str(tmp_path))
    assert content["scores"] == json.loads((tmp_path / "metrics.json").read_text())["scores"]
    assert content["manifest"]["num_items"] == 2


def test_first_lines_say_what_is_used_and_where_results_go(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["sample", "--checkpoint", str(RUNS / "t2i"), "--prompt", "a cube", "--steps", "3"]
    for folder in ("outputs/t2i", "outputs/t2i-2"):
        assert main(argv) == 0
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert first.startswith(f"Using {RUNS / 't2i'} (t2i, ema weights) on cpu in float32: euler, 3 steps, guidance ")
        assert second == f"Results go to {folder}."
    assert planned(Path("outputs/t2i")) == Path("outputs/t2i-3")
    assert planned(Path("outputs/t2i"), overwrite=True) == Path("outputs/t2i")
    assert planned(Path("outputs/t2i"), Path("other")) == Path("other")


def test_results_are_opened_on_request(tmp_path: Path, monkeypatch, capsys) -> None:
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", lambda path: opened.append(path) or 1)
    argv = ["sample", "--checkpoint", str(RUNS / "t2i"), "--prompt", "a cube", "--num", "2", "--output", str(tmp_path)]
    assert main([*argv, "--open"]) == 0
    assert opened == [str(tmp_path / "grid.png")]
    assert f"no program of this desktop shows {opened[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["list", "sovlers"], "Unknown WHAT 'sovlers'. Did you mean 'solvers'?"),
        (
            ["sample", "--checkpoint", "run", "--weights", "eam"],
            "Unknown value of --weights 'eam'. Did you mean 'ema'?",
        ),
        (["sample", "--checkpoint", "run", "--promt", "a"], "Did you mean one of: '--prompt', '--prompts'"),
        (["benchmark", "qualty"], "Did you mean 'quality'?"),
        (["completion", "bsh"], "Did you mean 'bash'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_near_names_are_suggested(refused, argv: list[str], near: str) -> None:
    assert near in refused(*argv)


@pytest.mark.parametrize("name", ["--negative", "--away-from"])
def test_a_negative_prompt_is_answered_with_what_to_use(refused, name: str) -> None:
    from crossflow.core.errors import UserError

    message = refused("sample", "--checkpoint", str(RUNS / "t2i"), "--prompt", "a cube", name, "red")
    assert '`crossflow arithmetic --base "a cube" --minus "red" --strength 0.5`' in message
    with pytest.raises(UserError, match=r'--base "a cone" --minus "blue"'):
        load(RUNS / "t2i")("a cone", negative_prompt="blue")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_values(shell: str) -> None:
    script = CliRunner().invoke(table, ["completion", shell], prog_name="crossflow")
    assert script.exit_code == 0
    assert "_CROSSFLOW_COMPLETE" in script.output
    program = shutil.which(shell)
    if program is not None:
        assert subprocess.run([program, "-n"], input=script.output, text=True, capture_output=True).stderr == ""
    for line, expected, other in (
        ("crossflow sa", "sample", "train"),
        ("crossflow train --task d", "depth", "t2i"),
        ("crossflow train --config t2i_s", "t2i_small", "t2i_tiny"),
        ("crossflow sample --weights e", "ema", "model"),
    ):
        place = line.rpartition(" ")[2] if shell == "fish" else str(line.count(" "))
        variables = {"_CROSSFLOW_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": place}
        answer = CliRunner().invoke(table, [], prog_name="crossflow", env=variables).output
        assert expected in answer
        assert other not in answer
