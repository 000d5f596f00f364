"""How fast training reads features: a cache beside one pickled file per sample, as the released scripts write them.

Both contain the same samples and give the same batches on the CPU, in a shuffled order and one process. Batches from
the cache keep the type in which they are stored, half precision: token features become float32 on the training device,
moments when the codec scales them.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.benchmarks.speed.released_files import (
    CLIP_WIDTH,
    CONTENTS,
    NUM_TOKENS,
    Batch,
    read_released,
    write_released,
)
from crossflow.core.noise import order
from crossflow.core.source import Posterior
from crossflow.data.cache.build import Builder, Settings
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import cached_batch
from crossflow.data.captioned import captioned_example
from crossflow.data.dataset import Examples
from crossflow.data.image_latents import latent_noise
from crossflow.data.readers import open_reader
from crossflow.networks.text.frozen_encoder import TextEncoderSettings

ROUNDS, BATCH = 5, 64
MEMORY = ("warm", "cold")
NUM_ROWS = len(CONTENTS) * len(MEMORY)


class _Codec:
    """What a cache records of a codec; the features exist already, so no network is needed."""

    kind, checksum, factor, has_spread = "autoencoder_kl", "0" * 64, 8, True

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        return 4, size // 8, size // 8


class _Text:
    """What a cache records of a text encoder."""

    family, checksum, width, max_length = "clip", "0" * 64, CLIP_WIDTH, NUM_TOKENS
    settings = TextEncoderSettings()


def write_cache(folder: Path, released: Path, keep_padding: bool = False) -> None:
    """Writes the samples of released files as a cache."""
    codec: Any = _Codec()
    text: Any = _Text()
    extractor = Extractor(Options((256,)), codec=codec, text=text, keep_padding=keep_padding)
    Builder(folder, {"all": open_reader(f"npy:{released}", "all")}, extractor, Settings()).run()


def cached_examples(folder: Path) -> Examples:
    """The samples of a cache as training opens them."""
    reader = open_reader(f"cache:{folder}", "all")
    return Examples(reader, lambda item, generator: captioned_example(item, 256, generator), seed=0)


def read_cached(examples: Examples, places: Sequence[tuple[int, int]]) -> tuple[Batch, list[int]]:
    """A batch as training reads it from a cache, and the seeds of its latents."""
    samples = examples.__getitems__(list(places))
    batch = cached_batch(samples, 256)
    assert batch is not None
    return (batch.moments(), *batch.text()), [sample["seed"] for sample in samples]


def reading_speed(
    folder: Path, count: int = 1024, rounds: int = ROUNDS, on_row: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """One row per content of the files and state of the system's file cache (cold: files come from the disk).

    Each has the samples per second of both and their ratio by the clock, the ratio of processor time (which other load
    does not change), the ratio with the drawing of latents added to both, the ratio if the cache's features become
    float32 on the CPU (as in training there), and the bytes of both. `on_row` is called after each row.
    """
    rows = []
    for place, content in enumerate(CONTENTS):
        number = count // 4 if content.everything else count
        released, cache = folder / f"released-{place}", folder / f"cache-{place}"
        write_released(released, number, content)
        write_cache(cache, released, content.keep_padding)
        released_bytes, cached_bytes = (
            sum(path.stat().st_size for path in kind.iterdir()) / number for kind in (released, cache)
        )
        for memory in MEMORY:
            epochs = _measure(released, cache, rounds, cold=memory == "cold")
            rows.append(
                {
                    "files": content.name,
                    "memory": memory,
                    "samples": number,
                    "mean_tokens": content.tokens,
                    **_compared(epochs, number),
                    "released_bytes_per_sample": round(released_bytes),
                    "cached_bytes_per_sample": round(cached_bytes),
                    "bytes_ratio": round(cached_bytes / released_bytes, 3),
                }
            )
            on_row()
        shutil.rmtree(released)
    return rows


@dataclass
class Seconds:
    """Seconds (by the clock, of the processor) that reading took in one epoch."""

    released: np.ndarray = field(default_factory=lambda: np.zeros(2))
    cached: np.ndarray = field(default_factory=lambda: np.zeros(2))
    drawing: np.ndarray = field(default_factory=lambda: np.zeros(2))
    """Drawing latents from the moments, which both need."""
    widening: np.ndarray = field(default_factory=lambda: np.zeros(2))
    """Converting cached token features to float32, which the training device does."""


def _compared(epochs: Sequence[Seconds], number: int) -> dict[str, float]:
    """Samples per second by the clock, and ratios; medians over the epochs."""

    def median(value: Callable[[Seconds], float]) -> float:
        return statistics.median(value(epoch) for epoch in epochs)

    return {
        "released_samples_per_second": round(median(lambda epoch: number / epoch.released[0])),
        "cached_samples_per_second": round(median(lambda epoch: number / epoch.cached[0])),
        "ratio": round(median(lambda epoch: epoch.released[0] / epoch.cached[0]), 2),
        "processor_time_ratio": round(median(lambda epoch: epoch.released[1] / epoch.cached[1]), 2),
        "ratio_with_latents_drawn": round(
            median(lambda epoch: (epoch.released + epoch.drawing)[0] / (epoch.cached + epoch.drawing)[0]), 2
        ),
        "ratio_with_float32_on_cpu": round(
            median(lambda epoch: epoch.released[0] / (epoch.cached + epoch.widening)[0]), 2
        ),
    }


def _measure(released: Path, cache: Path, rounds: int, cold: bool) -> list[Seconds]:
    """One entry per epoch. Both read the same shuffled batches in turn, like a process that only loads data; the first
    warm epoch is left out.
    """
    files, epochs = sorted(released.glob("*.npy")), []
    examples = cached_examples(cache)
    for epoch in range(rounds + (not cold)):
        if cold:
            examples = cached_examples(cache)  # reopened, since mapped files stay in memory
            _forget([*files, *cache.iterdir()])
        shuffled, seconds = order(0, epoch, len(files))[np.arange(len(files))].tolist(), Seconds()
        batches = [shuffled[start : start + BATCH] for start in range(0, len(shuffled), BATCH)]
        for batch in batches:
            with _timed(seconds.released):
                read_released([files[index] for index in batch])
        for batch in batches:
            with _timed(seconds.cached):
                (stored, features, _), seeds = read_cached(examples, [(epoch, index) for index in batch])
        assert stored.log_var is not None
        posterior = Posterior(stored.mean.float(), stored.log_var.float())
        for _ in batches:
            with _timed(seconds.drawing):
                posterior.sample(noise=latent_noise(seeds, posterior.mean.shape[1:]))
            with _timed(seconds.widening):
                features.float()
        epochs += [seconds] if cold or epoch > 0 else []
    return epochs


@contextmanager
def _timed(seconds: np.ndarray) -> Iterator[None]:
    """Adds the time that the body takes to `seconds`."""
    start = np.array([time.perf_counter(), time.process_time()])
    yield
    seconds += np.array([time.perf_counter(), time.process_time()]) - start


def _forget(files: Iterable[Path]) -> None:
    """Asks the system to drop files from its cache, so that they are read from the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
