"""Evaluations on the command line."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from crossflow.cli import main
from crossflow.tasks import task_names


@pytest.mark.parametrize("task", task_names())
def test_evaluate_writes_scores_with_their_manifest_and_a_page(tiny_run, tmp_path: Path, task: str) -> None:
    folder = tmp_path / "evaluation"
    assert main(["evaluate", "--checkpoint", str(tiny_run(task)), "--num", "6", "--output", str(folder)]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["scores"]["num_items"] == 6
    manifest = metrics["manifest"]
    assert manifest["data"]["split"] == "test"
    assert {"sample", "seed", "weights", "image_size", "versions", "num_items"} <= set(manifest)
    assert len((folder / "items.jsonl").read_text().splitlines()) == 6
    assert "<img" in (folder / "index.html").read_text()
    assert (folder / "pictures.png").is_file()


def test_an_evaluation_works_without_the_training_data(tiny_run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run("depth"), run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"train": "pairs:gone", "val": "scenes"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["evaluate", "--checkpoint", str(run), "--num", "2", "--seed", "3", "--weights", "model"]) == 0
    folder = run / "evaluation" / "scenes-test-euler2-seed3-model"
    assert "gone" in json.loads((folder / "metrics.json").read_text())["notes"][-1]
