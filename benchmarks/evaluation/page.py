"""The page of an evaluation: scores beside the baseline, then source, output and truth of the first items."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossflow.benchmarks.report.page import document, png
from crossflow.benchmarks.score_table import ScoreRow, score_rows
from crossflow.core.files import write_atomically
from crossflow.data.cases import Tile
from crossflow.data.images import save_png
from crossflow.engine.score import arrange


def write_page(folder: Path, title: str, content: Mapping[str, Any], pages: Sequence[Sequence[Tile]]) -> Path:
    """Writes index.html (self-contained) and pictures.png to `folder`; returns the path of index.html.

    content: that of metrics.json; pages: the tiles of each shown item.
    """
    rows = "".join(map(_row, score_rows(content["scores"], content["intervals"], content["baseline"])))
    strips = ["<div class=row>" + "".join(_figure(tile) for tile in page) + "</div>" for page in pages]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in content["notes"])
    manifest = html.escape("\n".join(f"{name}: {value}" for name, value in content["manifest"].items()))
    body = (
        f"<table><tr><th>score<th>this run<th>95 % interval<th>trivial baseline{rows}</table>{notes}"
        f"{''.join(strips)}<h2>Manifest</h2><pre>{manifest}</pre>"
    )
    write_atomically(folder / "index.html", document(title, body))
    if pages:
        save_png(arrange(pages, cell=160), folder / "pictures.png")
    return folder / "index.html"


def _row(row: ScoreRow) -> str:
    interval = f"{row.interval[0]:.4g} to {row.interval[1]:.4g}" if row.interval is not None else ""
    baseline = "" if row.baseline is None else f"{row.baseline:.4g}{' (shuffled)' * row.is_controlled}"
    return f"<tr><td>{html.escape(row.name)}<td>{row.value:.4g}<td>{interval}<td>{baseline}"


def _figure(tile: Tile) -> str:
    picture = base64.b64encode(png(tile.image)).decode()
    caption = html.escape(tile.text)
    return f'<figure><img src="data:image/png;base64,{picture}"><figcaption>{caption}</figcaption></figure>'
