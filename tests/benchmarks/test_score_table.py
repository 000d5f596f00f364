"""Controls stand beside the score that they control."""

from crossflow.benchmarks.evaluation.page import write_page
from crossflow.benchmarks.score_table import ScoreRow, score_rows


def test_a_control_becomes_the_baseline_of_its_score() -> None:
    scores = {"colors": 0.9, "shuffled_colors": 0.1, "judge": 0.99, "shuffled_alone": 0.5}
    assert score_rows(scores, {"colors": [0.8, 0.95]}) == [
        ScoreRow("colors", 0.9, (0.8, 0.95), 0.1, is_controlled=True),
        ScoreRow("judge", 0.99),
        ScoreRow("shuffled_alone", 0.5),
    ]


def test_a_baseline_takes_precedence_over_a_control() -> None:
    assert score_rows({"f1": 0.9, "shuffled_f1": 0.1}, baseline={"f1": 0.3}) == [ScoreRow("f1", 0.9, None, 0.3)]


def test_the_page_of_an_evaluation_shows_a_control_in_the_baseline_column(tmp_path) -> None:
    scores = {"colors": 0.91, "shuffled_colors": 0.0123}
    content = {"scores": scores, "intervals": {}, "baseline": {}, "notes": [], "manifest": {}}
    html = write_page(tmp_path, "title", content, []).read_text()
    assert "<td>colors<td>0.91<td><td>0.0123 (shuffled)" in html
    assert "shuffled_colors" not in html
