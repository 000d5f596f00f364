"""Rows are averaged where defined and gathered without duplicates; nothing is left on disk."""

import json

import pytest

from crossflow.core.errors import UserError
from crossflow.core.intervals import bootstrap_interval, wilson_interval
from crossflow.core.metrics import TaskMetric


class Difference(TaskMetric[float, float]):
    names = ("error", "ratio")

    def score(self, output, truth):
        if output < 0:
            raise ValueError("negative output")
        return {"error": abs(output - truth), "ratio": output / truth if truth else None}


def filled(pairs):
    metric = Difference()
    for index, (output, truth) in enumerate(pairs):
        metric.add(f"item{index}", output, truth)
    return metric


def test_means_over_rows():
    metric = filled([(1.0, 2.0), (4.0, 2.0)])
    assert metric.rows[0] == {"id": "item0", "error": 1.0, "ratio": 0.5}
    assert metric.compute() == {"error": 1.5, "ratio": 1.25, "num_items": 2.0}
    assert metric.notes == []
    assert metric.compute() == metric.compute()


def test_undefined_numbers_are_left_out_and_noted():
    metric = filled([(1.0, 0.0), (4.0, 2.0)])
    assert metric.compute() == {"error": 1.5, "ratio": 2.0, "num_items": 2.0}
    assert metric.notes == ["ratio is undefined for 1 of 2 items and averages the others"]
    assert set(metric.intervals()) == {"error"}
    json.dumps(metric.rows, allow_nan=False)


def test_nothing_to_average_is_an_error():
    with pytest.raises(UserError, match="No items were scored"):
        Difference().compute()
    with pytest.raises(UserError, match="ratio is undefined for all 1 scored items"):
        filled([(1.0, 0.0)]).compute()


def test_errors_name_the_item_and_keep_the_rows():
    metric = filled([(1.0, 2.0)])
    with pytest.raises(ValueError, match="item 'bad': negative output"):
        metric.add("bad", -1.0, 1.0)
    with pytest.raises(ValueError, match="'item0' has already been scored"):
        metric.add("item0", 1.0, 2.0)
    assert len(metric.rows) == 1


def test_rows_of_other_processes_are_added_once():
    first, second = filled([(1.0, 2.0), (4.0, 2.0)]), Difference()
    second.add("item1", 4.0, 2.0)
    second.add("other", 9.0, 1.0)
    first.extend(second.rows)
    assert [row["id"] for row in first.rows] == ["item0", "item1", "other"]
    assert first.compute()["error"] == pytest.approx((1 + 2 + 8) / 3)


def test_averages_of_zeros_and_ones_have_wilsons_interval_and_others_a_bootstrap() -> None:
    metric = filled([(2.0, 2.0)] * 12)
    assert metric.compute()["ratio"] == 1.0
    assert metric.intervals()["ratio"] == wilson_interval(12, 12)
    assert metric.intervals()["error"] == wilson_interval(0, 12)
    mixed = filled([(float(i), 4.0) for i in range(5)])
    assert mixed.intervals()["error"] == bootstrap_interval([4.0, 3.0, 2.0, 1.0, 0.0])


SCRIPT = """
from crossflow.core.metrics import mean_metric
for _ in range(20):
    assert mean_metric({"a": [1.0, None, 3.0]}) == {"a": 2.0}
"""


@pytest.mark.slow
def test_concurrent_processes_leave_no_files(forked, tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(SCRIPT)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    for process in [forked.Forked([str(program)], tmp_path / f"{number}.log") for number in range(3)]:
        process.finish()
    assert list((tmp_path / "folder").iterdir()) == []
