"""Every experiment of the papers trains, resumes, samples and is scored by the commands of docs/paper_recipes.md, on
data in the published layouts and with networks reduced in width.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from crossflow.cli import main
from crossflow.core.settings import shipped

PAGE = (Path(__file__).parents[2] / "docs" / "paper_recipes.md").read_text(encoding="utf-8")
BLOCKS = [
    [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("crossflow ")]
    for block in re.findall(r"^```bash recipe\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
]
SHARED = [
    *("data.num_train=8", "data.num_val=2", "source.width=32", "source.depth=1"),
    *("backbone.width=16", "backbone.depth=3", "backbone.heads=2"),
    *("train.steps=2", "train.batch_size=4", "train.warmup_steps=1", "train.precision=no", "train.sample_every=0"),
    "sample.steps=2",
]
TEXT = ["text.feature_width=32", "source.hidden=16", "source.heads=2"]
PIXELS = ["backbone.depth=1", "data.image_size=32"]
OF_TASK = {
    "t2i": TEXT,
    "flowtok": [*TEXT, "text.encoder=networks/clip", "data.image_size=32"],
    "caption": [
        *("data.image_size=32", "codec.source=networks/vae", "caption.text_steps=2", "caption.text_batch_size=4"),
        "caption.autoencoder.width=16",
    ],
    "depth": PIXELS,
    "sr": ["backbone.depth=1", "data.image_size=64", "sr.tile=256", "sr.overlap=16"],
}


def output(argv: list[str]) -> str:
    return argv[argv.index("--output") + 1]


def reduced(recipe: str) -> list[str]:
    """Overrides that leave a recipe its shape and make it train in a second."""
    family = recipe.split("_")[0]
    settings = [*SHARED, *OF_TASK[family]]
    if family == "t2i":
        encoder = "t5" if "_t5_" in recipe else "clip"
        side = 64 if "512" in recipe else 32
        settings += [f"text.encoder=networks/{encoder}", f"data.image_size={side}", "codec.source=networks/vae"]
        settings += ["tower.source=networks/siglip", "tower.width=32"]
    return settings


def networks_of(protocol: str) -> list[str]:
    if "fid" in protocol:
        return ["--network", "features=timm:test_resnet@random", "--network", "clip=networks/clip_score"]
    return ["--network", "features=timm:test_resnet@random"] if protocol == "imagenet-64-256" else []


def test_every_recipe_of_the_papers_has_its_commands():
    recipes = {argv[argv.index("--config") + 1] for block in BLOCKS for argv in block if "--config" in argv}
    assert recipes == {name for name in shipped() if re.search(r"_(256|512|351m|527m|505m)|flowtok", name)}


@pytest.fixture(scope="module")
def workspace(paper_data: Path, tmp_path_factory) -> Path:
    """The folder that the commands are started from: links to the data, and the runs of the blocks before."""
    folder = tmp_path_factory.mktemp("workspace")
    for place in paper_data.iterdir():
        (folder / place.name).symlink_to(place)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: Path(output(block[0])).name)
def test_the_commands_of_the_page_train_resume_sample_and_score(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, no_java: None, block: list[list[str]]
):
    monkeypatch.chdir(workspace)
    train, resume, sample, *evaluations = block
    run = Path(output(train))
    settings = reduced(train[train.index("--config") + 1])
    assert main([*train, *settings]) == 0
    assert main([*resume, "train.steps=3"]) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3
    assert main([*sample, "--output", f"samples/{run.name}"]) == 0
    assert any(Path(f"samples/{run.name}").iterdir())
    for argv in evaluations:
        protocol = argv[argv.index("--protocol") + 1]
        folder = Path(f"scores/{run.name}-{protocol}")
        assert main([*argv, *networks_of(protocol), "--output", str(folder)]) == 0
        measured = json.loads((folder / "metrics.json").read_text())
        assert measured["manifest"]["protocol"]["name"] == protocol
        assert measured["manifest"]["num_items"] >= 2
        assert measured["scores"]
