"""metrics.jsonl as curves, whatever state the file is in."""

import json
import math
from pathlib import Path

import pytest

from crossflow.core.errors import UserError
from crossflow.engine.run_log import Curve, RunLog, interpolated, read_log


def write(folder: Path, *lines: object, tail: bytes = b"") -> Path:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(text.encode() + tail)
    return folder


def train(step: int, **numbers: float | None) -> dict[str, object]:
    return {"kind": "train", "step": step, **numbers}


@pytest.mark.parametrize("tail", [b"", b'{"kind": "train", "st', b"\xff\x00\n", b"[1]\n", b'{"step": 3}\n', b"null"])
def test_a_line_that_is_not_whole_is_left_out(tmp_path: Path, tail: bytes) -> None:
    log = RunLog.read(write(tmp_path, train(1, flow=2.0), train(2, flow=1.0), tail=tail))
    assert log.curve("flow") == Curve("flow", (1, 2), (2.0, 1.0))


def test_what_a_resumed_run_has_repeated_is_taken_once(tmp_path: Path) -> None:
    log = RunLog.read(write(tmp_path, train(1, flow=2.0), train(2, flow=9.0), train(2, flow=1.0)))
    assert log.curve("flow").values == (2.0, 1.0)


def test_numbers_that_were_not_finite_are_gaps(tmp_path: Path) -> None:
    curve = RunLog.read(write(tmp_path, train(1, flow=2.0), train(2, flow=None))).curve("flow")
    assert math.isnan(curve.values[1])
    assert not curve.finite
    assert curve.without_gaps() == Curve("flow", (1,), (2.0,))


def test_losses_are_told_from_other_numbers(tmp_path: Path) -> None:
    line = train(5, loss=1.0, flow=1.0, kl=2.0, grad_norm=1.0, lr=1e-3, epoch=0.1, seconds_per_step=0.1)
    log = RunLog.read(write(tmp_path, line | {"data_seconds": 0.1, "unconditional": 0.1, "samples_per_second": 1.0}))
    assert log.losses() == ["loss", "flow", "kl"]


def test_bad_steps_are_read_beside_the_log(tmp_path: Path) -> None:
    (tmp_path / "bad_steps.jsonl").write_text('{"kind": "bad", "step": 9, "not_finite": ["flow"], "processes": []}\n')
    log = RunLog.read(write(tmp_path, train(5, flow=1.0)))
    assert log.lines["bad"][0]["not_finite"] == ["flow"]
    assert log.last_step == 5  # step 9 was not made


def test_minutes_add_up_over_intervals(tmp_path: Path) -> None:
    log = RunLog.read(write(tmp_path, train(60, seconds_per_step=1.0), train(90, seconds_per_step=4.0)))
    assert log.minutes([0, 30, 60, 75, 90, 99]) == pytest.approx([0, 0.5, 1, 2, 3, 3])


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1.0,), [1.0]), ((1.0, 2.0, 3.0), [1.0, 2.0, 3.0]), (tuple(map(float, range(8))), [0.5, 2.5, 4.5, 6.5])],
)
def test_quarters_are_medians_of_parts_in_order(values: tuple[float, ...], expected: list[float]) -> None:
    assert Curve("loss", tuple(range(len(values))), values).quarters() == expected


def test_a_curve_is_read_between_and_beyond_its_points() -> None:
    curve = Curve("loss", (10, 20), (1.0, 3.0))
    assert [interpolated(curve, step) for step in (0, 10, 15, 20, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    assert RunLog.read(tmp_path).lines == {}
    with pytest.raises(UserError, match=r"has no metrics\.jsonl with lines of a training"):
        read_log(tmp_path)
