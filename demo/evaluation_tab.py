"""The tab of evaluations: the worst and best items of a metrics.json, filtered by a score, and their pictures."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from crossflow.benchmarks.score_table import score_rows
from crossflow.core.errors import unknown_name
from crossflow.core.progress import Progress
from crossflow.demo import parts
from crossflow.demo.evaluations import ORDERS, Query, chosen, draw, list_evaluations, read, scores_of
from crossflow.demo.jobs import sentences
from crossflow.demo.limits import choice, number, whole
from crossflow.demo.parts import PRIVATE, Buttons, Site

MAX_WORDS = 160
"""Characters of a text in the table."""
HIDDEN = {"id", "references", "required", "kind", "relation"}
"""Fields of a row that are not shown as words."""


def build(site: Site, page: gr.Blocks) -> None:
    """The tab, with the endpoints /items and /draw_items."""
    limits, names = site.limits, list(list_evaluations(site.runs, site.models))
    first = _scores(_path(site, names[0])) if names else []
    with gr.Tab("Evaluation", id="evaluation"):
        parts.lead("Items of an evaluation from the worst, or from the best.")
        with gr.Row():
            name = gr.Dropdown(names, value=names[0], label="Evaluation", scale=3, allow_custom_value=True)
            score = gr.Dropdown(first, value=first[0], label="Score", scale=2, allow_custom_value=True)
            order = gr.Dropdown(list(ORDERS), value=ORDERS[0], label="Order", filterable=False, min_width=120)
        with gr.Row():
            low, high = (
                gr.Number(None, label=word, placeholder="any", min_width=90) for word in ("At least", "At most")
            )
            num = gr.Slider(1, limits.frames, value=6, step=1, label="Items", min_width=120)
        table = gr.HTML()
        buttons = Buttons.form("Draw these items", "run-items")
        shown = parts.gallery("Input, output, truth", [], columns=5)
    fields = [name, score, order, low, high, num]

    def items(name: str, score: str, order: str, low: float, high: float, num: float) -> str:
        with sentences():
            return _table(_path(site, name), _query(site, score, order, low, high, num))

    @site.jobs.endpoint
    def draw_items(
        on_step: Progress, name: str, score: str, order: str, low: float, high: float, num: float
    ) -> list[tuple[Any, str]]:
        path, query = _path(site, name), _query(site, score, order, low, high, num)
        ids = [str(row["id"]) for row in chosen(read(path)[1], query)]
        pages = draw(path, site.models, ids, on_step)
        return [(Image.fromarray(tile.image), tile.text[:MAX_WORDS]) for tiles in pages for tile in tiles]

    about = "Rows of an evaluation by a score, as HTML."
    triggers = [score.change, order.change, low.change, high.change, num.change]
    gr.on(triggers, items, fields, table, api_name="items", api_description=about, queue=False, show_progress="hidden")
    buttons.start(
        site, draw_items, fields, [shown], name="draw_items",
        about="Input, output and truth of the chosen rows, made again by the evaluated model.",
    )  # fmt: skip
    name.change(_other(site, items), [name, *fields[2:]], [score, table], queue=False, **PRIVATE)
    page.load(items, fields, table, queue=False, show_progress="hidden", **PRIVATE)


def _other(site: Site, items: Callable[..., str]) -> Any:
    """What is shown of another evaluation: its own first score."""

    def opened(name: str, order: str, low: float, high: float, num: float) -> tuple[Any, str]:
        with sentences():
            names = _scores(_path(site, name))
        return gr.update(choices=names, value=names[0]), items(name, names[0], order, low, high, num)

    return opened


def _path(site: Site, name: object) -> Path:
    listed = list_evaluations(site.runs, site.models)
    if name not in listed:
        raise unknown_name("evaluation", str(name)[:60], listed)
    return listed[str(name)]


def _scores(path: Path) -> list[str]:
    return scores_of(read(path)[1]) or ["none"]


def _query(site: Site, score: object, order: object, low: object, high: object, num: object) -> Query:
    """The checked fields of the form."""
    return Query(
        str(score)[:80],
        choice(order, "order", list(ORDERS)),
        -math.inf if low is None else number(low, "The start", -1e12, 1e12),
        math.inf if high is None else number(high, "The end", -1e12, 1e12),
        whole(num, "Items", 1, site.limits.frames),
    )


def _table(path: Path, query: Query) -> str:
    """The scores of an evaluation, and the rows of a query."""
    recorded, rows = read(path)
    kept = chosen(rows, query)
    totals = [(row.name, row.value) for row in score_rows(recorded.scores)]
    boxes = "".join(f"<div><b>{value:.4g}</b><span>{html.escape(name)}</span></div>" for name, value in totals[:8])
    if not kept:
        text = "<b>No such items</b>No row has this score within these bounds."
        return f'<div class="scores">{boxes}</div><div class="blank">{text}</div>'
    body = "".join(_row(row, query.score) for row in kept)
    head = f"<tr><th>{html.escape(query.score)}</th><th>Item</th><th>What</th></tr>"
    return f'<div class="scores">{boxes}</div><table class="items">{head}{body}</table>'


def _row(row: Mapping[str, Any], score: str) -> str:
    words = [str(value) for name, value in row.items() if name not in HIDDEN and isinstance(value, str)]
    references = row.get("references")
    if isinstance(references, Sequence) and not isinstance(references, str) and references:
        words.append(f"(truth: {references[0]})")
    text = " ".join(words)[:MAX_WORDS]
    item = html.escape(str(row.get("id", ""))[:80])
    return f'<tr><td class="value">{row[score]:.4g}</td><td>{item}</td><td>{html.escape(text)}</td></tr>'
