"""The tab of trainings: curves of the runs in a folder, over each other."""

import html
from pathlib import Path
from typing import Any

import gradio as gr

from crossflow.core.errors import UserError, unknown_name
from crossflow.demo import parts
from crossflow.demo.chart import charts
from crossflow.demo.jobs import sentences
from crossflow.demo.limits import choice
from crossflow.demo.parts import PRIVATE, Site
from crossflow.engine.curves import Panel, read_panels
from crossflow.engine.run_log import RunLog

MAX_RUNS = 8
MAX_DEPTH = 3
"""Folders below --runs in which runs are looked for."""
AXES = ["steps", "minutes", "cpu minutes"]
EMPTY = (
    '<div class="blank"><b>No curves yet</b>Choose runs above. A run is listed once it has reported its first step, '
    "also while it is being trained.</div>"
)


def list_runs(folder: Path) -> dict[str, Path]:
    """Runs with a log below a folder by their relative name, the newest first."""
    logs = [path for depth in range(MAX_DEPTH) for path in folder.glob(f"{'*/' * depth}metrics.jsonl")]
    logs = [path for path in logs if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    logs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    runs = {path.parent.relative_to(folder).as_posix(): path.parent for path in logs}
    return {folder.resolve().name if name == "." else name: path for name, path in runs.items()}


def build(site: Site, page: gr.Blocks, folder: Path) -> None:
    """The tab; the runs are listed anew whenever the page is opened."""
    with gr.Tab("Training", id="training"):
        parts.lead("Losses, gradient norm, validation and scores of the runs in a folder.")
        names = list(list_runs(folder))
        with gr.Row():
            runs = gr.Dropdown(
                names, value=names[:2], multiselect=True, max_choices=MAX_RUNS, label="Runs", scale=3,
                allow_custom_value=True,
            )  # fmt: skip
            x = gr.Dropdown(AXES, value=AXES[0], label="Over", filterable=False, scale=1, min_width=120)
        chart = gr.HTML(EMPTY)

    def curves(runs: list[str], x: str) -> str:
        with sentences():
            return draw(folder, runs, x)

    about = "Curves of runs as HTML with SVG."
    gr.on([runs.change, x.change], curves, [runs, x], chart, api_name="curves", api_description=about, queue=False)

    def opened() -> tuple[Any, str]:
        names = list(list_runs(folder))
        return gr.update(choices=names), draw(folder, names[:2], AXES[0]) if names else EMPTY

    page.load(opened, None, [runs, chart], queue=False, show_progress="hidden", **PRIVATE)


def draw(folder: Path, names: object, x: object) -> str:
    """The charts of runs by name. Raises UserError for names that are not listed."""
    known = list_runs(folder)
    chosen = [str(name) for name in names] if isinstance(names, list) else []
    if len(chosen) > MAX_RUNS:
        raise UserError(f"At most {MAX_RUNS} runs are drawn together; {len(chosen)} are chosen.")
    for name in chosen:
        if name not in known:
            raise unknown_name("run", name[:60], known)
    logs = {name: RunLog.read(known[name]) for name in dict.fromkeys(chosen)}
    ready = [name for name, log in logs.items() if log.last_step]
    if not ready:
        return EMPTY
    axis = choice(x, "axis", AXES)
    lines: dict[str, dict[str, Any]] = {}
    for name in ready:  # run by run, so that two of the same name are not labelled by their paths
        for panel in read_panels([known[name]], axis):  # type: ignore[arg-type]
            lines.setdefault(panel.name, {})[name] = next(iter(panel.lines.values()))
    waiting = "".join(f"<p>{html.escape(name)} has logged nothing yet.</p>" for name in logs if name not in ready)
    panels = [Panel(name, curves) for name, curves in lines.items()]
    curves = [panel for panel in panels if any(len(points) > 1 for points in panel.lines.values())]
    return charts(curves, ready, axis) + _table([panel for panel in panels if panel not in curves], ready) + waiting


def _table(panels: list[Panel], names: list[str]) -> str:
    """Numbers that were measured once, such as the scores after the last step."""
    if not panels:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *names))
    rows = []
    for panel in panels:
        values = [f"{panel.lines[name][-1][1]:.4g}" if name in panel.lines else "" for name in names]
        cells = "".join(f'<td class="value">{value}</td>' for value in values)
        rows.append(f"<tr><td>{html.escape(panel.name)}</td>{cells}</tr>")
    return f'<table class="items"><tr>{head}</tr>{"".join(rows)}</table>'
