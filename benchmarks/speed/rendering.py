"""How many scenes this machine creates and renders in a second."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

ROUNDS = 3
SIZES, PROCESSES = (32, 64), (1, 2)
CHUNK = 256
"""Scenes rendered at a time."""


def rendering_speed(
    sizes: Sequence[int] = SIZES,
    processes: Sequence[int] = PROCESSES,
    count: int = 1024,
    on_row: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Images per second for each side (px) and number of single-threaded processes; medians of three rounds.

    on_row: called after each row.
    """
    rows = []
    for size in sizes:
        for number in processes:
            with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool:
                share = count // number
                shares = [number * [share], [index * share for index in range(number)], number * [size]]

                def render(pool: ProcessPoolExecutor = pool, shares: list[list[int]] = shares) -> None:
                    list(pool.map(render_scenes, *shares))

                render()  # the processes start and import
                rate = round(count / _median_seconds(render))
                rows.append({"size": size, "processes": number, "images_per_second": rate})
                on_row()
    return rows


def render_scenes(count: int, first: int, size: int) -> int:
    """Creates and renders `count` scenes of the training split from number `first` on; returns their number."""
    import torch

    from crossflow.data.readers import open_reader

    torch.set_num_threads(1)
    reader = open_reader("scenes", "train", image_size=size, limit=first + count)
    for start in range(first, first + count, CHUNK):
        reader.load(range(start, min(start + CHUNK, first + count)))
    return count


def _median_seconds(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
