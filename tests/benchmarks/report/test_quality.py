"""The page of quality: rows land in their tables, differences are said, and nothing that is missing is made up."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from crossflow.benchmarks.report import page
from crossflow.benchmarks.report.measured import evaluations, find, flow_losses
from crossflow.benchmarks.report.paper import paper
from crossflow.benchmarks.report.quality import differences, places, quality, score_of, strip
from crossflow.cli import main
from crossflow.core.errors import UserError


def manifest(task: str, spec: str, **more: object) -> dict:
    sample = {"solver": "heun", "steps": 4, "guidance": 1.0}
    data = {"spec": spec, "split": "test", "fingerprint": "f"}
    return {"task": task, "data": data, "num_items": 100, "image_size": 64, "sample": sample, "seconds": 50.0} | more


@pytest.fixture
def evaluated(tmp_path: Path):
    """evaluated(name, scores, manifest): an evaluation in a run directory, with weights, times and pictures."""

    def write(name: str, scores: dict, about: dict) -> Path:
        run, folder = tmp_path / "runs" / name, tmp_path / "runs" / name / "evaluation" / "one"
        folder.mkdir(parents=True)
        (run / "config.yaml").write_text(f"task: {about['task']}\n")
        weights = {"backbone.w": torch.zeros(3000, 1000), "source_encoder.w": torch.zeros(500, 1000)}
        save_file(weights, run / "model.safetensors")
        lines = [{"kind": "train", "step": s, "flow": 300.0 / s, "seconds_per_step": 0.5} for s in (100, 200)]
        lines.append({"kind": "val", "step": 200, "flow": 1.0, "flow_shuffled": 2.0})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "metrics.json").write_text(json.dumps({"scores": scores, "manifest": about}))
        Image.fromarray(np.full((500, 80, 3), 9, np.uint8)).save(folder / "pictures.png")
        return run

    return write


def test_an_evaluation_is_read_with_its_cost(evaluated) -> None:
    run = evaluated("sr", {"psnr_y": 30.0}, manifest("sr", "folder:/data/Set5@all"))
    (row,), problems = find([run])
    assert not problems
    assert row.name == "sr (one)"
    assert row.cost.parameters == {"flow": 3_000_000, "source encoder": 500_000}
    assert row.cost.train_seconds == 100.0
    assert row.cost.evaluations == 8
    assert row.cost.seconds_per_item == 0.5


@pytest.mark.parametrize(
    ("sample", "count"),
    [
        ({"solver": "euler", "steps": 5}, 5),
        ({"solver": "euler", "steps": 5, "guidance": 2.0}, 10),
        ({"solver": "rk4", "steps": 2}, 8),
        ({"solver": "ab2", "steps": 4}, 5),
        ({"solver": "dopri5", "steps": 4}, None),
        (None, None),
    ],
)
def test_network_evaluations_are_counted_as_the_solver_counts_them(sample: dict | None, count: int | None) -> None:
    assert evaluations(sample) == count


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "ab2"])
def test_counts_of_evaluations_are_those_of_the_solvers(solver: str) -> None:
    from crossflow.core.solvers import solve

    counted = solve(lambda z, t: -z, torch.ones(1, 2), solver=solver, steps=3).evaluations[0]
    assert evaluations({"solver": solver, "steps": 3}) == counted


def test_a_run_is_set_beside_the_table_of_its_data_or_protocol_else_beside_the_main_one(evaluated) -> None:
    evaluated("a", {"psnr_y": 30.0}, manifest("sr", "folder:/data/Set5@all"))
    evaluated("b", {"psnr_y": 30.0}, manifest("sr", "scenes"))
    evaluated("c", {"abs_rel": 0.1}, manifest("depth", "pairs:x", protocol={"name": "kitti-eigen"}))
    rows, _ = find([evaluated("d", {"abs_rel": 0.1}, manifest("depth", "nyu:data/nyu")).parent])
    assert [places(row, paper()) for row in sorted(rows, key=lambda row: row.name)] == [
        ["sr-set5"],
        ["sr-imagenet"],
        ["depth-kitti"],
        ["depth-nyu"],
    ]


def test_what_makes_rows_incomparable_is_said_in_words(evaluated) -> None:
    (row,), _ = find([evaluated("d", {"abs_rel": 0.1, "delta1": 0.9}, manifest("depth", "scenes"))])
    said = "; ".join(differences(row, paper().table("depth-nyu"), paper()))
    assert "data set: scenes here, NYUv2" in said
    assert "items: 100 here, 654" in said
    assert "size: 3M here, 527M" in said
    assert "metric implementation" in said
    assert "split" not in said  # both are the test split


def test_a_run_by_the_papers_protocol_and_of_its_size_is_comparable(evaluated) -> None:
    about = manifest("depth", "nyu:x", protocol="nyu", num_items=654)
    (row,), _ = find([evaluated("d", {"abs_rel": 0.1, "delta1": 0.9}, about)])
    assert [word for word in differences(row, paper().table("depth-nyu"), paper()) if "size" not in word] == []


def test_scores_are_in_the_papers_unit(evaluated) -> None:
    (row,), _ = find([evaluated("c", {"CIDEr": 0.5, "BLEU-4": 0.25}, manifest("caption", "scenes"))])
    assert score_of(row, paper().metrics["CIDEr"]) == 50.0
    assert score_of(row, paper().metrics["METEOR"]) is None


def test_the_page_shows_ours_beside_the_papers_with_links_and_pictures(evaluated, tmp_path: Path, capsys) -> None:
    evaluated("sr", {"psnr_y": 30.0, "ssim_y": 0.9}, manifest("sr", "folder:/data/Set5@all"))
    depth = evaluated("depth", {"abs_rel": 0.1}, manifest("depth", "scenes"))
    (depth / "metrics.jsonl").unlink()
    broken = tmp_path / "runs" / "broken" / "evaluation" / "one"
    broken.mkdir(parents=True)
    (broken / "metrics.json").write_text('{"scores": {"psnr_y": 1.0}}')
    output = tmp_path / "out" / "page"
    assert main(["benchmark", "quality", "--runs", str(tmp_path / "runs"), "--output", str(output)]) == 0
    assert "it has no 'task'" in capsys.readouterr().err
    text, html = (output / "quality.md").read_text(), (output / "quality.html").read_text()
    assert "| Bicubic | paper | - | 28.42 | 0.8104 |" in text
    assert "[sr (one)](../../runs/sr/evaluation/one/metrics.json) | ours | 3M | 30 | 0.9 |" in text
    assert (output / "../../runs/sr/evaluation/one/metrics.json").is_file()
    assert "not measured here: delta1" in text
    assert "No evaluation of caption, t2i" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| depth | ")]
    assert "not said" in line  # the time of training, whose record is gone
    assert "Not measured here yet." in text  # captioning
    assert html.count("data:image/png;base64,") == text.count("](quality_pictures/")
    assert all((output / name).is_file() for name in (f"quality_pictures/{p}.png" for p in ("strip_0", "sr-set5")))
    assert "http" not in html


def test_the_page_shows_how_the_loss_of_a_run_fell(evaluated, tmp_path: Path) -> None:
    runs = [evaluated(name, {"psnr_y": 30.0}, manifest("sr", "set5:x")) for name in ("one", "two")]
    assert flow_losses(runs[0]) == {
        "training": [(100, 3.0), (200, 1.5)],
        "held out": [(200, 1.0)],
        "held out, shuffled sources": [(200, 2.0)],
    }
    markdown, _, _ = quality(runs, tmp_path / "page")
    assert all(f"quality_pictures/training_{number}.png" in markdown.read_text() for number in (0, 1))
    assert (tmp_path / "page" / "quality_pictures" / "training_1.png").is_file()


def test_a_strip_of_samples_ends_below_the_line_of_text_that_it_reaches(tmp_path: Path) -> None:
    sheet = np.full((40, 30, 3), 255, np.uint8)
    sheet[2:10, 4:20] = 0  # a picture
    sheet[12:17, 5:25:3] = 0  # a line of text below it
    path = tmp_path / "sheet.png"
    Image.fromarray(sheet).save(path)
    heights = [np.asarray(Image.open(io.BytesIO(strip(path, cut)))).shape[0] for cut in (14, 11, 100)]
    assert heights == [17, 11, 40]


def test_a_file_of_results_counts_too(tmp_path: Path) -> None:
    content = {"train_minutes": 2.5, "scored_on": "validation split", "scores": {"psnr_y": 30.0}}
    content["manifest"] = {"task": "sr", "data": {"spec": "scenes", "split": "train"}}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    (tmp_path / "speed.json").write_text("{}")
    (row,), problems = find([tmp_path])
    assert (row.name, row.cost.train_seconds, row.split, problems) == ("mine", 150.0, "validation split", [])


def test_folders_without_evaluations_are_told(tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match="There is no"):
        find([tmp_path / "nowhere"])
    assert main(["benchmark", "quality", "--runs", str(tmp_path)]) == 2
    assert "crossflow evaluate --checkpoint" in capsys.readouterr().err


def test_names_cannot_break_the_page() -> None:
    grid = page.Grid(["a|b"], [["<b>|"], [page.Link("x", "a b")]])
    assert "&lt;b&gt;|" in page._html(grid)
    assert "\\|" in page._markdown(grid, "p")
    assert "(a%20b)" in page._markdown(grid, "p")


@pytest.mark.slow
def test_a_run_that_was_only_trained_is_shown_with_its_last_scores(tiny_run) -> None:
    (row,), problems = find([tiny_run("depth")])
    assert (row.task, row.split, row.data, problems) == ("depth", "val", "scenes", [])
    assert row.cost.evaluations == 2
    assert row.cost.parameters is not None
    assert row.pictures is not None
