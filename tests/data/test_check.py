"""crossflow data check: what it counts, shows and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossflow.cli import main
from crossflow.data.check import inspect, open_splits, shared_ids
from crossflow.data.readers import open_reader


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Twenty pictures of two sizes with depth from 1 to 3 m, a quarter of it unmeasured."""
    for number in range(20):
        height, width = (8, 12) if number % 2 else (10, 6)
        depth = np.full((height, width), 1000 + 100 * number, dtype=np.uint16)
        depth[: height // 2, : width // 2] = 0
        for folder, array in (("rgb", np.full((height, width, 3), number, dtype=np.uint8)), ("depth", depth)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / f"data/{folder}/{number:02d}.png")
    return tmp_path / "data"


def test_inspection_counts_items_sizes_and_depth(pairs):
    (pairs / "rgb/03.png").write_bytes(b"broken")
    calls = []
    inspection = inspect(open_reader(f"pairs:{pairs}", "all"), num_shown=4, progress=lambda *call: calls.append(call))
    assert (inspection.total, inspection.good) == (20, 19)
    assert inspection.fields == ("depth", "image")
    assert list(inspection.bad) == ["03"]
    assert "not a picture" in inspection.bad["03"]
    assert inspection.numbers["height"] == "8 to 10 px, median 10"
    assert inspection.numbers["width"] == "6 to 12 px, median 6"
    assert inspection.numbers["depth"].startswith("1.00 to 2.90 m")
    assert inspection.numbers["measured pixels"].startswith("75.0% (0 items")
    assert calls[-1] == (20, 20)
    assert inspection.sheet.shape[2] == 3


def test_captions_are_counted_and_the_sheet_shows_the_requested_number(tmp_path):
    inspection = inspect(open_reader("scenes", "val", image_size=16, limit=5), num_shown=0)
    assert inspection.numbers["captions"] == "25 (5 with 5)"
    assert inspection.sheet is None
    few, more = (inspect(open_reader("scenes", "val", image_size=16, limit=9), num_shown=n).sheet for n in (1, 9))
    assert more.size > few.size


def test_data_check_writes_its_results_and_lists_bad_items(pairs, tmp_path, capsys):
    (pairs / "rgb/03.png").write_bytes(b"broken")
    out = tmp_path / "out"
    assert main(["data", "check", f"pairs:{pairs}", "--split", "all", "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert "19 of 20 items are good" in captured.out
    assert "bad 03: not a picture" in captured.err
    assert json.loads((out / "all.json").read_text())["bad"].keys() == {"03"}
    assert (out / "all_bad.tsv").read_text().startswith("03\tnot a picture")
    assert Image.open(out / "all.png").text["spec"] == f"pairs:{pairs}"
    Image.new("RGB", (12, 8)).save(pairs / "rgb/03.png")
    again = ["data", "check", f"pairs:{pairs}", "--split", "all", "--output", str(out)]
    assert main(again) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "all_bad.tsv").exists()
    assert main([*again, "--overwrite"]) == 0
    assert not (out / "all_bad.tsv").exists()


def test_too_many_bad_items_are_an_error(pairs, tmp_path, capsys):
    for number in (3, 4):
        (pairs / f"depth/{number:02d}.png").write_bytes(b"broken")
    call = ["data", "check", f"pairs:{pairs}", "--split", "all", "--output", str(tmp_path / "out")]
    assert main(call) == 2
    assert "2 of the 20 items of all are bad; the limit is 5%" in capsys.readouterr().err
    assert main([*call, "--overwrite", "--max-bad", "0.2"]) == 0


def test_data_check_opens_all_existing_splits_and_detects_shared_items(pairs, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / f"sorted/{split}").mkdir(parents=True)
        Image.new("RGB", (6, 4)).save(tmp_path / f"sorted/{split}/a.png")
    assert list(open_splits(f"folder:{tmp_path}/sorted")) == ["train", "test"]
    assert main(["data", "check", f"folder:{tmp_path}/sorted", "--output", str(tmp_path / "out")]) == 0
    assert {file.name for file in (tmp_path / "out").glob("[!.]*")} == {
        "train.json",
        "train.png",
        "test.json",
        "test.png",
    }
    readers = {split: open_reader(f"pairs:{pairs}@all", split) for split in ("val", "test")}
    assert shared_ids(readers) == {("test", "val"): list(readers["val"].ids)}
    assert main(["data", "check", f"folder:{tmp_path}/nowhere", "--output", str(tmp_path / "other")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["data", "check", f"folder:{tmp_path}/sorted", "--split", "val"]) == 2


def test_every_format_describes_its_layout_and_options(capsys):
    assert main(["list", "datasets"]) == 0
    captured = " ".join(capsys.readouterr().out.split())
    for word in ("karpathy", "wds", "?crop=", "eth3d", "urban100", "?stream="):
        assert word in captured
