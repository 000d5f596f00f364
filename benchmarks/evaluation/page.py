"""A page that shows an evaluation: scores beside the baseline, then source, output and truth side by side."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossflow.benchmarks.report.page import document, png
from crossflow.core.files import write_atomically
from crossflow.data.images import save_png
from crossflow.engine.score import arrange
from crossflow.tasks.base import Tile


def write_page(folder: Path, title: str, content: Mapping[str, Any], pages: Sequence[Sequence[Tile]]) -> Path:
    """Writes index.html (self-contained) and pictures.png to `folder`; returns the page."""
    rows = []
    for name, value in content["scores"].items():
        low_high = content["intervals"].get(name)
        span = f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else ""
        base = content["baseline"].get(name)
        rows.append(f"<tr><td>{html.escape(name)}<td>{value:.4g}<td>{span}<td>{'' if base is None else f'{base:.4g}'}")
    strips = ["<div class=row>" + "".join(_figure(tile) for tile in page) + "</div>" for page in pages]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in content["notes"])
    manifest = html.escape("\n".join(f"{name}: {value}" for name, value in content["manifest"].items()))
    body = (
        f"<table><tr><th>score<th>this run<th>95 % interval<th>trivial baseline{''.join(rows)}</table>{notes}"
        f"{''.join(strips)}<h2>How it was measured</h2><pre>{manifest}</pre>"
    )
    write_atomically(folder / "index.html", document(title, body))
    if pages:
        save_png(arrange(pages, cell=160), folder / "pictures.png")
    return folder / "index.html"


def _figure(tile: Tile) -> str:
    return (
        "<figure><img "
        f'src="data:image/png;base64,{base64.b64encode(png(tile.image)).decode()}">'
        f"<figcaption>{html.escape(tile.text)}</figcaption></figure>"
    )
