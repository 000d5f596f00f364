"""Hard texts through the commands: empty, very long, emoji, right-to-left; as prompts and as captions to train on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.cli import main

TEXTS = {
    "empty": "",
    "blank": " \t ",
    "long words": "a red cube left of a blue sphere " * 303,  # 9,999 characters
    "one long word": "x" * 10_000,
    "emoji": "a 🟥 left of a 🔵 👩‍👩‍👧‍👦🏳️‍🌈",
    "right to left": "مكعب أحمر إلى يسار كرة זה כדור כחול",
    "mixed directions": "a \u202ered cube\u202c \u200f(כדור)\u200e",
    "combining": "a r\u0301\u0302\u0303\u0304ed c\u0327ube \u0000 nul",
    "not a text": "a red \udcff cube",  # a byte of another encoding, as a shell passes it on
}


@pytest.mark.parametrize("name", TEXTS)
def test_any_prompt_gives_a_picture_that_carries_it(tiny_run, tmp_path: Path, name: str) -> None:
    run, text = str(tiny_run("t2i")), TEXTS[name]
    assert main(["sample", "--checkpoint", run, "--prompt", text, "--num", "2", "--output", str(tmp_path)]) == 0
    with Image.open(tmp_path / "0000_0.png") as picture:
        kept = picture.info["prompt"]
    assert kept == text.replace("\0", " ").replace("\udcff", "?")
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
def test_hard_texts_work_in_prompt_files_and_latent_tools(tiny_run, tmp_path: Path) -> None:
    run, lines = str(tiny_run("t2i")), [text for text in TEXTS.values() if text.strip() and "\udcff" not in text]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    assert main(["sample", "--checkpoint", run, "--prompts", str(prompts), "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == len(lines) + 1
    for start, end in (("empty", "long words"), ("right to left", "emoji"), ("not a text", "one long word")):
        argv = ["interpolate", "--checkpoint", run, "--from", TEXTS[start], "--to", TEXTS[end], "--frames", "2"]
        assert main([*argv, "--output", str(tmp_path / f"{start} to {end}")]) == 0


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Pictures whose captions are those texts among ordinary ones; two of forty have no caption at all."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    hard = list(TEXTS.values())
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (18, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        text = hard[number] if number < len(hard) else f"a picture of {number} things"
        lines.append({"image": f"{number}.png", "caption": text})
    # json holds half of a surrogate pair as an escape
    (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "data.jsonl"


@pytest.mark.parametrize("task", ["t2i", pytest.param("caption", marks=pytest.mark.slow)])
def test_any_caption_can_be_trained_on_and_scored(tiny_settings, tmp_path: Path, captioned: Path, task: str) -> None:
    run = tmp_path / "run"
    settings = [word for word in tiny_settings(task) if not word.startswith("data.num_train")]
    argv = ["train", "--task", task, "--data", f"jsonl:{captioned}@all", "--output", str(run), *settings]
    assert main([*argv, "train.steps=10"]) == 0  # ten steps of four see every item
    argv = ["evaluate", "--checkpoint", str(run), "--num", "40", "--output", str(tmp_path / "scores")]
    assert main(argv) == 0
    manifest = json.loads((tmp_path / "scores" / "metrics.json").read_text())["manifest"]
    assert len(manifest["bad_items"]) == 2
    assert all("caption" in reason for reason in manifest["bad_items"].values())
    assert manifest["num_items"] == 38


def test_data_whose_captions_are_all_empty_are_refused(tiny_settings, tmp_path: Path, captioned: Path, capsys) -> None:
    lines = [json.loads(line) | {"caption": " "} for line in captioned.read_text().splitlines()]
    captioned.write_text("\n".join(json.dumps(line) for line in lines))
    argv = ["train", "--task", "t2i", "--data", f"jsonl:{captioned}", "--output", str(tmp_path / "run")]
    capsys.readouterr()
    assert main([*argv, *tiny_settings("t2i")]) == 2
    assert "caption" in capsys.readouterr().err
