"""Pages made of blocks (headings, text, tables, pictures), written as Markdown and as one self-contained HTML file."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from crossflow.core.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}table{border-collapse:collapse}"
    "td,th{padding:.2em .9em;border-bottom:1px solid "
    "#ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
    ".row{display:flex;gap:.6em;margin:.6em 0}figure{margin:0;max-width:16em}img{width:12em;image-rendering:pixelated}"
    "figcaption{font-size:13px;white-space:pre-wrap}pre{background:#f6f6f6;padding:1em;overflow:auto}"
    "img.whole{width:auto;max-width:100%}tr.highlighted{background:#eef6ee}"
)


@dataclass(frozen=True)
class Link:
    """A table cell that links to a file."""

    text: str
    target: str


Cell = str | Link


@dataclass(frozen=True)
class Heading:
    """A heading; level 2 is that of a section."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A bulleted list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table; `highlighted` holds the indices of highlighted rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    highlighted: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A PNG picture; `name` is the stem of its file beside the Markdown."""

    name: str
    png: bytes
    alt: str


Block = Heading | Text | Bullets | Grid | Picture


def write(folder: Path, name: str, title: str, blocks: Sequence[Block]) -> tuple[Path, Path]:
    """Writes NAME.md with its pictures in NAME_pictures/, and NAME.html, which embeds them. Returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder / f"{name}_pictures"
    for block in blocks:
        if isinstance(block, Picture):
            write_atomically(pictures / f"{block.name}.png", block.png)
    markdown, page = folder / f"{name}.md", folder / f"{name}.html"
    lines = [f"# {title}", *(_markdown(block, pictures.name) for block in blocks)]
    write_atomically(markdown, "\n\n".join(lines) + "\n")
    write_atomically(page, document(title, "".join(map(_html, blocks))))
    return markdown, page


def document(title: str, body: str) -> str:
    """A complete HTML document. The title is plain text and gets escaped; the body is HTML."""
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{body}"
    )


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return block.text
        case Bullets():
            return "\n".join(f"- {item}" for item in block.items)
        case Picture():
            return f"![{block.alt}]({pictures}/{block.name}.png)"
        case Grid():
            rows = [block.header, ["---"] * len(block.header), *block.rows]
            return "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows)


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f"[{_markdown_cell(cell.text)}]({cell.target.replace(' ', '%20')})"
    return cell.replace("|", "\\|").replace("\n", " ")


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{html.escape(block.text)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{html.escape(item)}" for item in block.items) + "</ul>"
        case Picture():
            data = base64.b64encode(block.png).decode()
            return f'<p><img class=whole alt="{html.escape(block.alt)}" src="data:image/png;base64,{data}">'
        case Grid():
            head = "<tr>" + "".join(f"<th>{html.escape(name)}" for name in block.header)
            body = (
                f"<tr{' class=highlighted' if number in block.highlighted else ''}>"
                + "".join(f"<td>{_html_cell(c)}" for c in row)
                for number, row in enumerate(block.rows)
            )
            return f"<table>{head}{''.join(body)}</table>"


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f'<a href="{html.escape(cell.target)}">{html.escape(cell.text)}</a>'
    return html.escape(cell)


def png(picture: np.ndarray) -> bytes:
    """A picture uint8 (H, W, 3) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def figure_png(figure: "Figure") -> bytes:
    """A matplotlib figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def bars(title: str, values: Sequence[tuple[str, float, bool]], error: Sequence[float] | None = None) -> bytes:
    """Horizontal bars (name, value, highlighted) as PNG; `error`: half the width of each value's interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 0.32 * len(values)))
    axes = figure.add_subplot()
    axes.barh(
        range(len(values)),
        [value for _, value, _ in values],
        xerr=error,
        color=["#2a7f4f" if highlighted else "#b8b8b8" for *_, highlighted in values],
    )
    axes.set_yticks(range(len(values)), [name for name, *_ in values])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Curves of points (x, y) by name as PNG, y on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.6))
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="o" if len(points) < 12 else None)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)
