"""Curves of several runs over each other, as characters and as a picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

from crossflow.core.errors import UserError
from crossflow.engine.curves import Panel, read_panels, save_chart, text_chart


def run(folder: Path, factor: float = 1.0) -> Path:
    folder.mkdir()
    lines = [
        {"kind": "train", "step": step, "flow": factor / step, "lr": 0.1, "seconds_per_step": 6.0}
        for step in range(10, 101, 10)
    ]
    lines.append({"kind": "val", "step": 100, "flow": factor})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"step": 100, "scores": {"psnr": 30.0, "num_items": 4}, "intervals": {"psnr": [29, 31]}, "baseline": {}}
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def test_panels_hold_the_runs_that_log_their_number(tmp_path: Path) -> None:
    panels = {panel.name: panel for panel in read_panels([run(tmp_path / "a"), run(tmp_path / "b", 2.0)])}
    assert list(panels) == ["flow", "val/flow", "score/psnr"]  # neither the clock nor the schedule
    assert panels["flow"].lines["b"][0] == (10.0, 0.2)
    assert panels["score/psnr"].lines == {"a": [(100.0, 30.0)], "b": [(100.0, 30.0)]}


def test_curves_are_chosen_by_name_and_drawn_over_minutes(tmp_path: Path) -> None:
    (panel,) = read_panels([run(tmp_path / "a")], "minutes", ["lr"])
    assert panel.lines["a"][-1] == (10.0, 0.1)  # 100 steps of 6 s
    with pytest.raises(UserError, match=r"No run has logged nothing\. Logged: flow, lr"):
        read_panels([run(tmp_path / "b")], names=["nothing"])


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first, second = run(tmp_path / "a"), run(tmp_path / "x" / "a")
    assert list(read_panels([first, second])[0].lines) == [str(first), str(second)]
    with pytest.raises(UserError, match="named twice"):
        read_panels([first, first])


def test_a_line_runs_from_corner_to_corner() -> None:
    chart = text_chart(Panel("loss", {"run": [(0.0, 1.0), (10.0, 0.0)]}), width=11, height=11)
    assert chart[0] == "loss    • run"
    assert [row[12:].index("•") for row in chart[1:12]] == list(range(11))
    assert chart[1].split() == ["1", "│•"]
    assert chart[11].split() == ["0", "│", "•"]
    assert chart[-1].split() == ["0", "10"]


def test_values_over_more_than_a_factor_of_ten_are_logarithmic() -> None:
    chart = text_chart(Panel("loss", {"run": [(0.0, 1.0), (1.0, 0.1), (2.0, 0.01)]}), width=3, height=3)
    assert [row[12:] for row in chart[1:4]] == ["•", " •", "  •"]
    assert chart[0].startswith("loss (logarithmic)")


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(5.0, -1.0), (5.0, 3.0)]])
def test_points_without_extent_are_drawn(points: list[tuple[float, float]]) -> None:
    assert sum("•" in row for row in text_chart(Panel("x", {"run": points}))[1:]) >= 1


def test_runs_have_marks_of_their_own() -> None:
    panel = Panel("x", {"a": [(0.0, 0.0), (1.0, 0.0)], "b": [(0.0, 1.0), (1.0, 1.0)]})
    chart = text_chart(panel, width=4, height=2)
    assert chart[0] == "x    • a  × b"
    assert [row[12:] for row in chart[1:3]] == ["××××", "••••"]


@pytest.mark.slow
def test_the_picture_has_every_panel(tmp_path: Path) -> None:
    panels = read_panels([run(tmp_path / "a"), run(tmp_path / "b", 2.0)])
    path = save_chart(panels, tmp_path / "curves.png")
    with Image.open(path) as picture:
        assert picture.width > 3 * 400
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line of each run
