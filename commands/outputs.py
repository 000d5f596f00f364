"""Result files of the commands: what the task writes for each output, a grid, an animation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossflow.commands.checkpoint import Model
from crossflow.commands.console import count, say

if TYPE_CHECKING:
    import numpy as np


def write_grid(pictures: "Sequence[np.ndarray]", names: Sequence[str], path: Path) -> Path:
    """Writes pictures (H, W, 3) uint8 side by side with the names under them; returns the path."""
    from crossflow.data.images import save_png
    from crossflow.data.sheet import sheet

    cell, columns = min(512, max(128, pictures[0].shape[1])), len(pictures) if len(pictures) <= 6 else None
    return save_png(sheet(list(pictures), list(names), columns=columns, cell=cell), path)


def write_results(model: Model, results: Sequence[Any], names: Sequence[str], folder: Path, **details: object) -> None:
    """Writes what the task makes of every result, and a grid of pictures; prints captions.

    details: metadata that all the files carry.
    """
    written: list[Path] = []
    for index, (result, name) in enumerate(zip(results, names, strict=True)):
        written += model.pipe.task.write_output(result, folder / f"{index:03d}", model.metadata(what=name, **details))
        if isinstance(result, str):
            say(f"{name}: {result}")
    if pictures := model.pipe.task.pictures(results):
        written.append(write_grid(pictures, names, folder / "grid.png"))
    say(f"Wrote {count(len(written), 'file')} to {folder} ({written[-1].name}).")


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
