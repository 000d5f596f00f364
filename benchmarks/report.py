"""A page that shows an evaluation: scores beside the baseline, then source, output and truth side by side."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crossflow.tasks.base import Tile
from crossflow.tasks.common.images import save_png
from crossflow.tasks.run import write_atomically
from crossflow.tasks.scoring import laid_out

STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}table{border-collapse:collapse}"
    "td,th{padding:.2em .9em;border-bottom:1px solid "
    "#ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
    ".row{display:flex;gap:.6em;margin:.6em 0}figure{margin:0;max-width:16em}img{width:12em;image-rendering:pixelated}"
    "figcaption{font-size:13px;white-space:pre-wrap}pre{background:#f6f6f6;padding:1em;overflow:auto}"
)


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
    text = (
        "<!doctype html><meta "
        f"charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<table><tr><th>score<th>this run<th>95 % interval<th>trivial baseline{''.join(rows)}</table>{notes}"
        f"{''.join(strips)}<h2>How it was measured</h2><pre>{manifest}</pre>"
    )
    write_atomically(folder / "index.html", text)
    if pages:
        save_png(laid_out(pages, cell=160), folder / "pictures.png")
    return folder / "index.html"


def _figure(tile: Tile) -> str:
    return (
        "<figure><img "
        f'src="data:image/png;base64,{_png(tile.image)}"><figcaption>{html.escape(tile.text)}</figcaption></figure>'
    )


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
