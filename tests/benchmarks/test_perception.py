"""The page of perception and distortion: its rows, and what its numbers mean."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from crossflow.benchmarks.perception import FEATURES, SHARPNESS, Study, measure
from crossflow.cli import main
from crossflow.networks.picture_distances import FeatureDistance
from crossflow.tasks.sr.metric import SrMetric


class Repeats:
    """A model whose outputs are given."""

    def __init__(self, change) -> None:
        self.change = change

    def outputs(self, inputs, ids, seed, settings):
        return [self.change(picture) for picture in inputs]


def test_the_truth_is_sharp_and_a_blurred_picture_is_not() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(3)]
    cases = [SimpleNamespace(id=str(i), input=picture, truth=picture) for i, picture in enumerate(pictures)]
    scoring = SimpleNamespace(metric=lambda: SrMetric(4), headline=("psnr_y",))
    study = Study((1,), (1.0,), 3, distance=FeatureDistance("timm:test_resnet@random"))
    numbers = {
        name: measure(
            Repeats(change), SimpleNamespace(cases=cases, scoring=scoring), SimpleNamespace(batch_size=2), study
        )
        for name, change in {
            "exact": lambda picture: picture,
            "smooth": lambda picture: np.repeat(picture[::2], 2, axis=0),
        }.items()
    }
    assert numbers["exact"] == {"psnr_y": 100.0, SHARPNESS: 1.0, FEATURES: pytest.approx(0, abs=1e-6)}
    assert numbers["smooth"][SHARPNESS] < 0.8
    assert numbers["smooth"][FEATURES] > 0.01


@pytest.mark.slow
def test_a_page_has_a_row_for_each_way_of_sampling(
    tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    depth, sr = str(tiny_run("depth")), str(tiny_run("sr"))
    argv = ["benchmark", "perception", "--steps", "1,2", "--num", "2", "--output"]
    assert main([*argv, str(tmp_path / "depth"), depth, "--deviations", "0,1"]) == 0
    rows = json.loads((tmp_path / "depth/perception.json").read_text())["rows"]
    assert [(row["steps"], row["deviation"], row["evaluations"]) for row in rows] == [
        (1, 0, 1), (2, 0, 2), (1, 1, 1), (2, 1, 2),
    ]  # fmt: skip
    assert rows[0]["scores"] != rows[2]["scores"]
    assert main([*argv, str(tmp_path / "sr"), sr, "--network", "timm:test_resnet@random"]) == 0
    rows = json.loads((tmp_path / "sr/perception.json").read_text())["rows"]
    assert [row["deviation"] for row in rows] == [0, 0], "a deterministic source has one way"
    assert FEATURES in rows[0]["scores"]
    assert "features" in (tmp_path / "sr/perception.md").read_text()
    for wrong in (["--steps", "1.5", sr], ["--deviations", "-1", sr], [sr, depth], [str(tiny_run("t2i"))]):
        assert main([*argv, str(tmp_path / "none"), *wrong]) == 2, wrong
    message = capsys.readouterr().err
    assert "--steps takes whole numbers of at least 1" in message
    assert "A page compares runs of one task" in message
    assert "have no single truth" in message
