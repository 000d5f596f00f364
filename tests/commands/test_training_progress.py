"""A training is shown as a bar on a terminal and as plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from crossflow.commands.training_progress import RichProgress, describe
from crossflow.core.progress import duration

LINE = {
    "kind": "train", "step": 20, "loss": 0.51234, "flow": 0.5, "grad_norm": 2.0, "lr": 1e-4, "epoch": 0.2,
    "seconds_per_step": 0.5, "samples_per_second": 8.0, "data_seconds": 0.1, "unconditional": 0.125,
}  # fmt: skip


def test_without_a_terminal_each_report_is_a_plain_line() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, width=60))
    progress.begin(0, 100)
    progress.advance(1)
    progress.report(LINE)
    progress.report({"kind": "val", "step": 20, "score": 0.75})
    progress.report({"kind": "sample", "step": 20})
    progress.note("Saved [somewhere].")
    progress.end()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step 20/100 loss 0.5123  flow 0.5  0.5 s/step  40s left",
        "step 20/100 val: score 0.75",
        "Saved [somewhere].",
    ]


def test_a_terminal_shows_a_bar_with_losses_and_remaining_time() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, width=120, force_terminal=True, legacy_windows=False))
    progress.begin(10, 100)
    progress.report(LINE)
    progress.advance(20)
    progress.end()
    shown = stream.getvalue()
    assert "20/100" in shown
    assert "flow 0.5" in shown
    assert "40s left" in shown


def test_describe_shows_losses_and_times_only() -> None:
    assert describe(LINE, 20) == "loss 0.5123  flow 0.5  0.5 s/step  0s left"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (75.2, "1m15s"), (7300, "2h01m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
