"""Rows are averaged where defined, gathered without doubles, resampled for an interval; nothing is left on disk."""

import json
import subprocess
import sys

import numpy as np
import pytest

from crossflow.core.errors import UserError
from crossflow.core.metrics import TaskMetric, bootstrap_interval


class Difference(TaskMetric):
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
    assert metric.notes == ["ratio is not defined for 1 of 2 items and averages the rest"]
    assert set(metric.intervals()) == {"error"}
    json.dumps(metric.rows, allow_nan=False)


def test_nothing_to_average_is_an_error():
    with pytest.raises(UserError, match="No items were scored"):
        Difference().compute()
    with pytest.raises(UserError, match="ratio is not defined for any of the 1 items"):
        filled([(1.0, 0.0)]).compute()


def test_errors_name_the_item_and_keep_the_rows():
    metric = filled([(1.0, 2.0)])
    with pytest.raises(ValueError, match="item 'bad': negative output"):
        metric.add("bad", -1.0, 1.0)
    with pytest.raises(ValueError, match="'item0' was scored before"):
        metric.add("item0", 1.0, 2.0)
    assert len(metric.rows) == 1


def test_rows_of_other_processes_are_taken_once():
    first, second = filled([(1.0, 2.0), (4.0, 2.0)]), Difference()
    second.add("item1", 4.0, 2.0)
    second.add("other", 9.0, 1.0)
    first.extend(second.rows)
    assert [row["id"] for row in first.rows] == ["item0", "item1", "other"]
    assert first.compute()["error"] == pytest.approx((1 + 2 + 8) / 3)


def test_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(random.normal(3.0, 1.0, 40), num_resamples=200, seed=trial)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 199


def test_interval_is_a_function_of_the_seed():
    values = np.random.default_rng(1).normal(size=30)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_interval([1.0])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(values, level=95)


@pytest.mark.slow
def test_processes_at_once_leave_nothing_behind(tmp_path):
    script = (
        "from crossflow.core.metrics import mean_metric\n"
        "for _ in range(20): assert mean_metric({'a': [1.0, None, 3.0]}) == {'a': 2.0}\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    assert list(tmp_path.iterdir()) == []
