"""Every fenced command and piece of code in README and docs runs, with small settings, or says why it does not.

A page runs from top to bottom in a folder of its own that holds `my_pictures` (40 pictures with captions), `photo.jpg`
and, except for the README, `runs/TASK_tiny` of every task. A block ```` ```bash skip="reason" ```` does not run, and
```` ```bash recipe ```` runs in tests/recipes.
"""

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from crossflow.benchmarks.speed.rendering import rendering_speed
from crossflow.cli import main
from crossflow.tasks import task_names

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
LANGUAGES = {"bash", "python", "text", "yaml"}


class Fence(NamedTuple):
    line: int
    language: str
    options: str
    """What stands behind the language, such as skip="why"."""
    body: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.options


def fences(text: str) -> list[Fence]:
    """The fenced blocks of a page, in order."""
    blocks = []
    for match in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        language, _, options = match[2].strip().partition(" ")
        blocks.append(Fence(text[: match.start()].count("\n") + 1, language, options, match[3]))
    return blocks


def commands(block: Fence) -> list[list[str]]:
    """The words of each command; a backslash joins lines."""
    lines = block.body.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def page(name: str) -> list[Fence]:
    return fences((ROOT / name).read_text(encoding="utf-8"))


def small(argv: list[str], tiny_settings) -> list[str]:
    """A command that trains, caches, times, samples or plans, with settings that make it take about a second."""
    if argv[0] == "finetune" and "--dry-run" not in argv:
        return [*argv, "train.steps=2", "train.batch_size=4", "data.num_val=2"]
    if argv[0] == "sample":
        steps = argv.index("--steps") if "--steps" in argv else len(argv)
        return [*argv[:steps], *argv[steps + 2 :], "--steps", "2"]
    learns = argv[0] in ("train", "cache") or (argv[:2] == ["benchmark", "speed"] and "--recipe" in argv)
    learns = learns or (argv[0] == "doctor" and "--task" in argv)
    if not learns or {"--resume", "--verify"} & set(argv):
        return [*argv, "train.steps=4"] if "--resume" in argv else argv
    options = [name for name in ("--task", "--config", "--recipe") if name in argv]
    task = argv[argv.index(options[0]) + 1].split("_")[0]
    task = ",".join(task_names()) if task == "joint" else task
    chosen = {word.partition("=")[0] for word in argv} - {"train.steps"}
    extra = [word for word in tiny_settings(task) if word.partition("=")[0] not in chosen]
    return [*(word for word in argv if not word.startswith("train.steps=")), *extra]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch, blind_judge, no_java) -> Path:
    """The current folder of a page, with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    # `crossflow benchmark speed --part scenes`: few small pictures in one process
    monkeypatch.setattr(rendering_speed, "__defaults__", ((8,), (1,), 8, lambda: None))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    picture.save("photo.jpg")
    Path("my_pictures").mkdir()
    for number in range(40):
        picture.save(f"my_pictures/{number}.jpg")
        Path(f"my_pictures/{number}.txt").write_text("a picture of noise\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAGES if any(block.runs for block in page(name))])
def test_a_page_runs(name: str, workplace: Path, tiny_settings, tiny_run) -> None:
    if name != "README.md":
        for task in task_names():
            shutil.copytree(tiny_run(task), workplace / "runs" / f"{task}_tiny")
    for block in page(name):
        if block.runs and block.language == "python":
            exec(compile(block.body, f"{name}:{block.line}", "exec"), {})
        elif block.runs:
            for program, *argv in commands(block):
                assert program == "crossflow", f"{name}:{block.line}: mark a block of other programs by skip"
                assert main(small(argv, tiny_settings)) == 0, f"{name}:{block.line}: {shlex.join(argv)}"


@pytest.mark.parametrize("name", PAGES)
def test_every_block_runs_or_says_why_not(name: str) -> None:
    for block in page(name):
        assert block.language in LANGUAGES, f"{name}:{block.line}"
        assert block.options in ("", "recipe") or re.fullmatch(r'skip="[^"]{10,}"', block.options), block.options
        assert block.options != "recipe" or name == "docs/paper_recipes.md", "tests/recipes reads that page alone"


@pytest.mark.parametrize("name", PAGES)
def test_skipped_commands_exist(name: str) -> None:
    for block in page(name):
        for program, *argv in commands(block) if block.language == "bash" else ():
            if program == "crossflow" and argv[0] != "--debug":
                assert main([*argv[: 2 if argv[0] in ("data", "benchmark") else 1], "--help"]) == 0, argv


def test_readme_is_short_and_shows_a_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    assert re.search(r"!\[[^\]]+\]\(docs/[^)]+\.png\)", text)
    assert sum(len(commands(block)) for block in fences(text) if block.runs and block.language == "bash") >= 12


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name: str) -> None:
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            assert Path(os.path.normpath(folder / link)).exists(), link


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {Path(name).name for name in PAGES if name.startswith("docs/")} - {"README.md"} <= set(
        re.findall(r"\]\(([^)]+)\)", index)
    )


def test_fences_are_read() -> None:
    text = 'a\n```bash skip="a good reason"\nx \\\n  y # z\n```\n\n```python\nprint(1)\n```\n'
    first, second = fences(text)
    assert (first.line, first.language, first.runs, commands(first)) == (2, "bash", False, [["x", "y"]])
    assert (second.language, second.runs, second.body) == ("python", True, "print(1)\n")
