"""The quality page: evaluations land beside the right tables, with differences and missing values spelled out."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import crossflow
from crossflow.benchmarks.report import page
from crossflow.benchmarks.report.matching import differences, places, score_of
from crossflow.benchmarks.report.measured import evaluations, find, flow_losses
from crossflow.benchmarks.report.paper import paper
from crossflow.benchmarks.report.quality import quality, strip
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


T2I_SMALL = {"solver": "ab2", "steps": 50, "guidance": 6.0, "guidance_interval": [0.0, 0.5]}


@pytest.mark.parametrize(
    ("sample", "count"),
    [
        ({"solver": "euler", "steps": 5}, 5),
        ({"solver": "euler", "steps": 5, "guidance": 2.0}, 10),
        ({"solver": "rk4", "steps": 2}, 8),
        ({"solver": "ab2", "steps": 4}, 5),
        (T2I_SMALL, 78),
        ({"solver": "euler", "steps": 10, "guidance": 3.0, "zero_init": 2}, 16),
        ({"solver": "dopri5", "steps": 4}, None),
        ({"solver": "of a later version", "steps": 4}, None),
        (None, None),
    ],
)
def test_recorded_settings_give_the_number_of_network_evaluations(sample: dict | None, count: int | None) -> None:
    assert evaluations(sample) == count


def test_the_recorded_result_of_t2i_small_costs_78_evaluations_per_item() -> None:
    (row,), _ = find([Path(crossflow.__file__).parent / "benchmarks" / "results" / "t2i_small.json"])
    assert row.cost.evaluations == 78


def test_a_run_is_shown_beside_the_table_of_its_protocol_or_data_else_the_main_table(evaluated) -> None:
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


def test_differences_from_a_table_are_spelled_out(evaluated) -> None:
    (row,), _ = find([evaluated("d", {"abs_rel": 0.1, "delta1": 0.9}, manifest("depth", "scenes"))])
    words = "; ".join(differences(row, paper().table("depth-nyu"), paper()))
    assert "data set: scenes here, NYUv2" in words
    assert "items: 100 here, 654 in the paper" in words
    assert "size: 3M here, 527M" in words
    assert "metric implementation" in words
    assert "split" not in words  # both are the test split


def test_a_run_by_the_papers_protocol_differs_in_size_only(evaluated) -> None:
    about = manifest("depth", "nyu:x", protocol="nyu", num_items=654)
    (row,), _ = find([evaluated("d", {"abs_rel": 0.1, "delta1": 0.9}, about)])
    assert [word for word in differences(row, paper().table("depth-nyu"), paper()) if "size" not in word] == []


def test_scores_are_converted_to_the_papers_unit(evaluated) -> None:
    (row,), _ = find([evaluated("c", {"CIDEr": 0.5, "BLEU-4": 0.25}, manifest("caption", "scenes"))])
    assert score_of(row, paper().metrics["CIDEr"]) == 50.0
    assert score_of(row, paper().metrics["METEOR"]) is None


@pytest.mark.slow
def test_the_page_shows_runs_beside_the_papers_rows_with_links_and_pictures(evaluated, tmp_path: Path, capsys) -> None:
    evaluated("sr", {"psnr_y": 30.0, "ssim_y": 0.9}, manifest("sr", "folder:/data/Set5@all"))
    depth = evaluated("depth", {"abs_rel": 0.1}, manifest("depth", "scenes"))
    (depth / "metrics.jsonl").unlink()
    broken = tmp_path / "runs" / "broken" / "evaluation" / "one"
    broken.mkdir(parents=True)
    (broken / "metrics.json").write_text('{"scores": {"psnr_y": 1.0}}')
    output = tmp_path / "out" / "page"
    assert main(["benchmark", "quality", "--runs", str(tmp_path / "runs"), "--output", str(output)]) == 0
    assert "'task' is missing" in capsys.readouterr().err
    text, html = (output / "quality.md").read_text(), (output / "quality.html").read_text()
    assert "| Bicubic | paper | - | 28.42 | 0.8104 |" in text
    assert "[sr (one)](../../runs/sr/evaluation/one/metrics.json) | crossflow | 3M | 30 | 0.9 |" in text
    assert (output / "../../runs/sr/evaluation/one/metrics.json").is_file()
    assert "not measured here: delta1" in text
    assert "Tasks without an evaluation in these folders: caption, t2i." in text
    (line,) = [line for line in text.splitlines() if line.startswith("| depth | ")]
    assert "unknown" in line  # the training time, whose record was removed
    assert "No run has been evaluated on this yet." in text  # captioning
    assert html.count("data:image/png;base64,") == text.count("](quality_pictures/")
    assert all((output / name).is_file() for name in (f"quality_pictures/{p}.png" for p in ("strip_0", "sr-set5")))
    assert "http" not in html


@pytest.mark.slow
def test_the_page_shows_the_loss_curves_of_each_run(evaluated, tmp_path: Path) -> None:
    runs = [evaluated(name, {"psnr_y": 30.0}, manifest("sr", "set5:x")) for name in ("one", "two")]
    assert flow_losses(runs[0]) == {
        "training": [(100, 3.0), (200, 1.5)],
        "held out": [(200, 1.0)],
        "held out, shuffled sources": [(200, 2.0)],
    }
    markdown, _, _ = quality(runs, tmp_path / "page")
    assert all(f"quality_pictures/training_{number}.png" in markdown.read_text() for number in (0, 1))
    assert (tmp_path / "page" / "quality_pictures" / "training_1.png").is_file()


def test_a_strip_of_samples_does_not_cut_a_line_of_text(tmp_path: Path) -> None:
    sheet = np.full((40, 30, 3), 255, np.uint8)
    sheet[2:10, 4:20] = 0  # a picture
    sheet[12:17, 5:25:3] = 0  # a line of text below it
    path = tmp_path / "sheet.png"
    Image.fromarray(sheet).save(path)
    heights = [np.asarray(Image.open(io.BytesIO(strip(path, cut)))).shape[0] for cut in (14, 11, 100)]
    assert heights == [17, 11, 40]


def test_a_loose_results_file_is_read(tmp_path: Path) -> None:
    content = {"train_minutes": 2.5, "scored_on": "validation split", "scores": {"psnr_y": 30.0}}
    content["manifest"] = {"task": "sr", "data": {"spec": "scenes", "split": "train"}}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    (tmp_path / "speed.json").write_text("{}")
    (row,), problems = find([tmp_path])
    assert (row.name, row.cost.train_seconds, row.split, problems) == ("mine", 150.0, "validation split", [])


def test_places_without_evaluations_are_reported(tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find([tmp_path / "nowhere"])
    assert main(["benchmark", "quality", "--runs", str(tmp_path)]) == 2
    assert "crossflow evaluate --checkpoint" in capsys.readouterr().err


def test_names_are_escaped() -> None:
    grid = page.Grid(["a|b"], [["<b>|"], [page.Link("x", "a b")]])
    assert "&lt;b&gt;|" in page._html(grid)
    assert "\\|" in page._markdown(grid, "p")
    assert "(a%20b)" in page._markdown(grid, "p")


@pytest.mark.slow
def test_a_run_that_was_only_trained_is_shown_with_its_final_scores(tiny_run) -> None:
    (row,), problems = find([tiny_run("depth")])
    assert (row.task, row.split, row.data, problems) == ("depth", "val", "scenes", [])
    assert row.cost.evaluations == 2
    assert row.cost.parameters is not None
    assert row.pictures is not None
