"""The README's commands and code run as they stand there, on tiny settings."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("crossflow ")]


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch, tiny_settings, blind_judge) -> None:
    monkeypatch.chdir(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    picture.save("photo.jpg")
    Path("my_pictures").mkdir()
    for number in range(40):
        picture.save(f"my_pictures/{number}.jpg")
        Path(f"my_pictures/{number}.txt").write_text("a picture of noise\n")
    assert len(commands()) >= 12
    for argv in commands():
        extra = []
        if argv[0] == "train" or (argv[0] == "cache" and "--config" in argv):
            at = {name: argv[argv.index(name) + 1] for name in ("--task", "--config") if name in argv}
            task = at.get("--task") or at["--config"].split("_")[0]
            given = {word.partition("=")[0] for word in argv}
            extra = [word for word in tiny_settings(task) if word.partition("=")[0] not in given]
            if "caption_from_t2i" in argv:
                extra = [word for word in extra if not word.startswith("train.steps")]
        assert main([*argv, *extra]) == 0, argv
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "copy" / "config.yaml").is_file()


def test_the_readme_shows_pictures_that_are_there() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parent.parent / path).is_file(), path
