"""Progress, tables and messages on the terminal."""

import time

from crossflow.commands.console import progress_bar, show_scores


def test_a_bar_appears_for_long_work_only(monkeypatch) -> None:
    from rich.progress import Progress

    started: list[Progress] = []
    monkeypatch.setattr(Progress, "start", lambda bar: started.append(bar))
    with progress_bar("short", after=60) as move:
        move(1, 1)
    assert started == []
    with progress_bar("long", after=0.01):
        time.sleep(0.3)
    assert len(started) == 1


def test_without_a_terminal_progress_is_printed_as_lines(capsys) -> None:
    with progress_bar("scoring", every=0) as move:
        move(3, 8)
    assert capsys.readouterr().out == "scoring: 3 of 8\n"
    with progress_bar("scoring") as move:
        move(3, 8)
    assert capsys.readouterr().out == ""


def test_scores_of_shuffled_inputs_stand_in_the_baseline_column(capsys) -> None:
    show_scores({"loss": 1.0, "shuffled_colour": 0.125, "colour": 0.5}, {"colour": (0.25, 0.75)}, {}, ["colour"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "colour" in line or "loss" in line]
    assert len(lines) == 2
    assert lines[0].replace("│", "").split() == ["colour", "0.5", "0.25", "to", "0.75", "0.125", "(shuffled)"]
    assert "baseline" not in lines[1]
