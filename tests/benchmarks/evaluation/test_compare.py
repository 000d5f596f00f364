"""Evaluations on the same items are compared by pairs; manifests say what else differs."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from crossflow.benchmarks.evaluation.compare import (
    CIRCUMSTANCES,
    MEASUREMENT,
    MODEL,
    Recorded,
    compare_scores,
    differences,
    expect_repeated,
    options_of,
    read_evaluation,
)
from crossflow.core.errors import UserError


def recorded(folder: Path, scores: dict, rows: list[dict], intervals: dict | None = None) -> Recorded:
    folder.mkdir()
    content = {"scores": scores, "intervals": intervals or {}, "manifest": {}}
    (folder / "metrics.json").write_text(json.dumps(content))
    if rows:
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_evaluation(folder)


def from_values(folder: Path, values: np.ndarray) -> Recorded:
    """Items that differ far more than two models do, with their wide 95 % interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    rows = [{"id": str(number), "psnr_y": value} for number, value in enumerate(values.tolist())]
    return recorded(folder, {"psnr_y": mean}, rows, {"psnr_y": [mean - half, mean + half]})


@pytest.fixture
def psnr() -> np.ndarray:
    return np.random.default_rng(0).normal(30, 5, 40)


def test_a_small_difference_on_the_same_items_is_significant_although_intervals_overlap(tmp_path, psnr) -> None:
    shift = np.random.default_rng(1).normal(0.2, 0.1, 40)
    a, b = from_values(tmp_path / "a", psnr), from_values(tmp_path / "b", psnr + shift)
    assert a.intervals["psnr_y"][1] > b.intervals["psnr_y"][0]
    ((name, first, second, verdict),) = compare_scores(a, b)
    assert (name, second - first) == ("psnr_y", pytest.approx(shift.mean()))
    low, high = stats.t.interval(0.95, 39, loc=shift.mean(), scale=stats.sem(shift))
    assert verdict == f"second higher: {shift.mean():+.3g} ± {(high - low) / 2:.2g} over 40 pairs"


def test_pairs_are_matched_by_id_and_not_by_place(tmp_path, psnr) -> None:
    a = from_values(tmp_path / "a", psnr)
    rows = [{"id": str(number), "psnr_y": psnr[number] - 1} for number in range(39, -1, -1)]
    b = recorded(tmp_path / "b", {"psnr_y": float(psnr.mean() - 1)}, rows)
    ((*_, verdict),) = compare_scores(a, b)
    assert verdict.startswith("second lower: -1 ± ")


def test_noise_alone_is_not_distinguishable(tmp_path, psnr) -> None:
    noise = np.random.default_rng(2).normal(0, 1, 40)
    ((*_, verdict),) = compare_scores(from_values(tmp_path / "a", psnr), from_values(tmp_path / "b", psnr + noise))
    assert verdict.startswith("not distinguishable: ")


def test_without_rows_intervals_are_compared(tmp_path) -> None:
    a = recorded(tmp_path / "a", {"x": 1.0, "y": 1.0}, [], {"x": [0.5, 1.5], "y": [0.9, 1.1]})
    b = recorded(tmp_path / "b", {"x": 1.2, "y": 2.0}, [], {"x": [0.7, 1.7], "y": [1.9, 2.1]})
    words = [verdict for *_, verdict in compare_scores(a, b)]
    assert words == ["intervals overlap (no pairs of rows)", "intervals apart (no pairs of rows)"]


def test_scores_of_a_whole_set_are_not_paired(tmp_path) -> None:
    """The BLEU of a corpus is not the mean of the rows' BLEU."""
    rows = [{"id": str(number), "BLEU-4": 0.1 * number} for number in range(4)]
    a = recorded(tmp_path / "a", {"BLEU-4": 0.3}, rows, {"BLEU-4": [0.2, 0.4]})
    b = recorded(tmp_path / "b", {"BLEU-4": 0.9}, rows, {"BLEU-4": [0.8, 1.0]})
    assert compare_scores(a, b)[0][-1] == "intervals apart (no pairs of rows)"


def verdicts(correct: dict[str, list[int]]) -> tuple[dict, list[dict]]:
    rows = [
        {"id": f"{kind}/{number}", "kind": kind, "correct": value}
        for kind, values in correct.items()
        for number, value in enumerate(values)
    ]
    scores = {kind: sum(values) / len(values) for kind, values in correct.items()}
    return {**scores, "overall": sum(scores.values()) / len(scores)}, rows


def test_verdicts_by_kind_and_their_overall_mean_are_paired(tmp_path) -> None:
    a = recorded(tmp_path / "a", *verdicts({"colors": [0, 0, 0, 0, 1, 1], "counting": [0, 1, 0, 1]}))
    b = recorded(tmp_path / "b", *verdicts({"colors": [1, 1, 1, 1, 1, 0], "counting": [0, 1, 0, 1]}))
    words = {name: verdict for name, *_, verdict in compare_scores(a, b)}
    assert words["counting"] == "equal"
    assert words["colors"].endswith("over 6 pairs")
    assert words["overall"].endswith("over 10 pairs")
    half = stats.t.ppf(0.975, 8) * np.sqrt(np.var([1, 1, 1, 1, 0, -1], ddof=1) / 6) / 2
    assert f"+0.25 ± {half:.2g}" in words["overall"]


def test_manifests_are_compared_by_what_a_difference_means() -> None:
    a = {"sample": {"steps": 3}, "data": {"fingerprint": "x"}, "machine": "m", "started": "now", "seed": 0}
    b = {"sample": {"steps": 1}, "data": {"fingerprint": "y"}, "machine": "n", "started": "later", "seed": 0}
    assert differences(a, b) == {
        MEASUREMENT: ['data.fingerprint: "x" -> "y"'],
        MODEL: ["sample.steps: 3 -> 1"],
        CIRCUMSTANCES: ['machine: "m" -> "n"'],
    }


def test_a_repeated_evaluation_with_other_numbers_is_an_error_that_names_the_cause(tmp_path) -> None:
    before = Recorded(tmp_path / "metrics.json", {"psnr": 30.0}, {}, {"seed": 0})
    assert expect_repeated(before, {"psnr": 30.0}, {}) == f"The numbers are the same as in {before.path} (1 compared)."
    with pytest.raises(UserError, match=r"psnr 30 -> 31\. The manifests differ in: seed: 0 -> 1"):
        expect_repeated(before, {"psnr": 31.0}, {"seed": 1})
    with pytest.raises(UserError, match=r"psnr 30 -> missing\. The manifests do not differ"):
        expect_repeated(before, {}, {"seed": 0})


def test_files_without_an_evaluation_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="not an evaluation"):
        read_evaluation(tmp_path)
    with pytest.raises(UserError, match="has no weights, data"):
        options_of({"checkpoint": "run", "sample": {}, "seed": 0, "num": 3})
