"""Result files of the commands: what the task writes for each output, a grid, an animation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossflow.commands.checkpoint import Model
from crossflow.commands.console import count, open_file, say

if TYPE_CHECKING:
    import numpy as np


def write_grid(pictures: "Sequence[np.ndarray]", names: Sequence[str], path: Path) -> Path:
    """Writes pictures (H, W, 3) uint8 side by side with the names under them; returns the path."""
    from crossflow.data.images import save_png
    from crossflow.data.sheet import sheet

    cell, columns = min(512, max(128, pictures[0].shape[1])), len(pictures) if len(pictures) <= 6 else None
    return save_png(sheet(list(pictures), list(names), columns=columns, cell=cell), path)


@dataclass(frozen=True)
class Result:
    """A raw output of the task, with the names and metadata of its files."""

    value: Any
    stem: str
    """Beginning of the names of its files."""
    label: str
    """Shown under its picture in the grid, or before its caption."""
    details: Mapping[str, object]
    """Metadata in addition to `Model.metadata`."""


def write_results(model: Model, results: Sequence[Result], folder: Path) -> list[dict[str, object]]:
    """Writes the files of every result and shows them, see `show_results`; returns their listing."""
    return show_results(model, [write_result(model, result, folder) for result in results], folder)


def write_result(model: Model, result: Result, folder: Path) -> tuple[Result, list[Path]]:
    """Writes the files of a result; returns it, of an ensemble with what was combined as its value, and the files."""
    from crossflow.data.combined import Combined

    stem, metadata = folder / result.stem, model.metadata(**result.details)
    more: list[Path] = []
    if isinstance(result.value, Combined):
        more = result.value.write(stem, metadata)
        result = replace(result, value=result.value.value)
    return result, [*model.pipe.task.write_output(result.value, stem, metadata), *more]


def show_results(model: Model, written: Sequence[tuple[Result, list[Path]]], folder: Path) -> list[dict[str, object]]:
    """Prints captions, writes a grid of several pictures, and opens the last file under --open.

    written: results with their files. Returns a listing: what each result is, its metadata and files.
    """
    listing: list[dict[str, object]] = []
    for result, paths in written:
        text = {"text": result.value} if isinstance(result.value, str) else {}
        listing.append({"label": result.label, **text, **result.details, "files": list(map(str, paths))})
        if isinstance(result.value, str):
            say(f"{result.label}: {result.value}")
    files, results = [path for _, paths in written for path in paths], [result for result, _ in written]
    if len(results) > 1 and (pictures := model.pipe.task.pictures([result.value for result in results])):
        files.append(write_grid(pictures, [result.label for result in results], folder / "grid.png"))
    say(f"Wrote {count(len(files), 'file')} to {folder} ({files[-1].name}).")
    if model.open_result:
        open_file(files[-1])
    return listing


def numbered_results(values: Sequence[Any], labels: Sequence[str], **details: object) -> list[Result]:
    """Results 000, 001, ... with their label as the metadata `what`, beside details that they share."""
    return [
        Result(value, f"{number:03d}", label, {"what": label, **details})
        for number, (value, label) in enumerate(zip(values, labels, strict=True))
    ]


def write_animation(pictures: "Sequence[np.ndarray]", folder: Path, fps: float) -> None:
    """Writes pictures (H, W, 3) uint8 as an animated GIF, and as an MP4 where the extra for it is installed."""
    from crossflow.engine import animation

    if not pictures:
        return
    say(f"Animated: {animation.save_gif(pictures, folder / 'animation.gif', fps)}")
    if animation.can_write_mp4():
        say(f"Animated: {animation.save_mp4(pictures, folder / 'animation.mp4', fps)}")
    else:
        say(f"For an MP4 beside it: {animation.VIDEO_EXTRA}")
