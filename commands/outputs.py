"""Files that the commands write."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from crossflow.commands.checkpoint import Use
from crossflow.commands.console import say


def write_grid(pictures: Sequence[Any], names: Sequence[str], path: Path) -> Path:
    from crossflow.data.images import save_png
    from crossflow.data.sheet import sheet

    cell, columns = min(512, max(128, pictures[0].shape[1])), len(pictures) if len(pictures) <= 6 else None
    return save_png(sheet(list(pictures), list(names), columns=columns, cell=cell), path)


def write_all(use: Use, results: Sequence[Any], names: Sequence[str], folder: Path, **about: Any) -> None:
    """What the task writes for every result, and a grid of them."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for index, (result, name) in enumerate(zip(results, names, strict=True)):
        written += use.pipe.task.write_output(result, folder / f"{index:03d}", use.metadata(what=name, **about))
        if isinstance(result, str):
            say(f"{name}: {result}")
    if pictures := use.pipe.task.pictures(results):
        written.append(write_grid(pictures, names, folder / "grid.png"))
    say(f"Wrote {len(written)} files to {folder} ({written[-1].name}).")


def animate(use: Use, results: Sequence[Any], folder: Path, fps: float) -> None:
    """An animated GIF of results that are pictures, and an MP4 where that can be written."""
    from crossflow.engine import animation

    pictures = use.pipe.task.pictures(results)
    if not pictures:
        return
    say(f"Animated: {animation.save_gif(pictures, folder / 'animation.gif', fps)}")
    if animation.can_write_mp4():
        say(f"Animated: {animation.save_mp4(pictures, folder / 'animation.mp4', fps)}")
    else:
        say(f"For an MP4 beside it: {animation.VIDEO_EXTRA}")


def mixes_latents(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command of `uses_checkpoint` the options that say which source latents are mixed."""
    function = click.option("--mean", is_flag=True, help="Take means of the source posteriors instead of samples.")(
        function
    )
    return click.option(
        "--noise",
        type=click.Choice(["shared", "own"]),
        default="shared",
        show_default=True,
        help="Samples take the same noise, so that they differ by their meaning alone, or each its own.",
    )(function)
