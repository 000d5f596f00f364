"""How fast a process opens data that are indexed already, finds the examples of a step, and what a loader worker keeps.

Lists of pictures are opened first by another process, which builds their index; only the second opening is measured, in
a fresh process. Memory is what a process shares with no other one, on Linux: mapped files are shared by all.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from crossflow.core.files import replacing
from crossflow.core.noise import KeyedOrder
from crossflow.data.captioned import captioned_example
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.readers import open_reader, require

SIZES = (1_000_000, 10_000_000)
NUM_ORDERED, STEP = 10**9, 1024
BATCHES, BATCH = 10_000, 4
NUM_ROWS = len(SIZES) + 2


def opening_speed(
    folder: Path, sizes: Sequence[int] = SIZES, batches: int = BATCHES, on_row: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """One row per number of pictures in a list, one for the order of an epoch, one for the memory of a loader worker.

    folder: for temporary files, in which the indices are kept too. `on_row` is called after each row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in sizes:
        file = folder / f"{size}.jsonl"
        write_list(file, size)
        build, _ = _in_process(_opened, file, folder)
        seconds, memory = _in_process(_opened, file, folder)
        rows.append(
            {
                "what": "list of pictures, opened again",
                "items": size,
                "seconds": round(seconds, 4),
                "private_megabytes": round(memory / 1e6, 1),
                "seconds_to_index": round(build, 1),
            }
        )
        on_row()
        file.unlink()
    rows.append({"what": f"positions of a step of {STEP}", "items": NUM_ORDERED, "seconds": round(step_seconds(), 6)})
    on_row()
    early, late = _in_process(_worker_memory, folder, batches)
    rows.append(
        {
            "what": "loader worker",
            "batches": batches,
            "private_megabytes_after_a_tenth": round(early / 1e6, 1),
            "private_megabytes": round(late / 1e6, 1),
        }
    )
    on_row()
    return rows


def write_list(file: Path, size: int) -> None:
    """A list of pictures that need not exist."""
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(
            f'{{"img_path": "./{place % 1000:03d}/{place:08d}.jpg", "prompt": "picture {place} of a long list"}}\n'
            for place in range(size)
        )


def step_seconds() -> float:
    """Seconds that the examples of one step among a billion take to find; the median of several."""
    times = []
    for epoch in range(20):
        permutation, places = KeyedOrder(NUM_ORDERED, "order", 0, epoch), np.arange(STEP) + epoch * STEP
        start = time.perf_counter()
        permutation[places]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def private_memory() -> int:
    """Bytes of this process that no file backs; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _in_process(function: Callable[..., tuple[float, float]], *arguments: Path | int) -> tuple[float, float]:
    """The result of a call in a fresh process, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _opened(file: Path, cache: Path) -> tuple[float, float]:
    """(seconds, bytes) that opening a list as training does takes."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    write_list(cache / "first.jsonl", 30)
    _open(cache / "first.jsonl")  # so that the libraries that it imports are not counted
    memory, start = private_memory(), time.perf_counter()
    examples = _open(file)
    seconds = time.perf_counter() - start
    return seconds, private_memory() - memory if len(examples) else 0


def _open(file: Path) -> Examples:
    reader = require(open_reader(f"jsonl:{file}", "train"), ("image", "captions"), "benchmark")
    return Examples(reader, _example, seed=0)


def _example(item: Item, generator: np.random.Generator) -> dict[str, Any]:
    return captioned_example(item, 16, generator)


class _Batches(Dataset[int]):
    """Batch number -> the private memory of the process that has read it."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, number: int) -> int:
        places = np.arange(BATCH) + number * BATCH
        epoch, inner = divmod(places, len(self.examples))
        order = self.examples.order(0, int(epoch[0]))
        self.examples.__getitems__([(int(epoch[0]), int(index)) for index in order[inner]])
        return private_memory()


def _worker_memory(folder: Path, batches: int) -> tuple[float, float]:
    """Private memory of a loader worker after a tenth of the batches, and after all, of a set that does not fit."""
    from PIL import Image

    os.environ["XDG_CACHE_HOME"] = str(folder)
    size = max(1000, batches * BATCH)
    Image.effect_noise((32, 32), 50).convert("RGB").save(folder / "picture.png")
    for part in range(1000):
        (folder / f"{part:03d}").mkdir(exist_ok=True)
    for place in range(size):
        os.link(folder / "picture.png", folder / f"{place % 1000:03d}/{place:08d}.jpg")
    write_list(folder / "worker.jsonl", size)
    examples = _open(folder / "worker.jsonl")
    examples.cache_bytes = 100 * size  # far fewer than the decoded pictures have, as of any large set
    loader = DataLoader(_Batches(examples), batch_size=None, sampler=range(batches), num_workers=1)
    memory = [int(value) for value in loader]
    return memory[len(memory) // 10], memory[-1]
