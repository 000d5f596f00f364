"""How fast training reads features: a cache beside one pickled file per sample, as the released scripts write them.

Both hold the same samples and give the same batches on the CPU, in a shuffled order and one process: moments
(B, C, h, w), token features (B, N, D) with their padding, mask. What comes from the cache stays in the type it is
stored in, half precision: token features become float32 on the training device, moments when the codec scales them.
B batch, N tokens, D width.
"""

import os
import pickle
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from crossflow.core.noise import order
from crossflow.core.source import Posterior
from crossflow.data.cache.build import Builder, Settings
from crossflow.data.cache.extract import Extractor, Options
from crossflow.data.cache.training import cached_batch
from crossflow.data.captioned import captioned_example
from crossflow.data.dataset import Examples
from crossflow.data.image_latents import draw
from crossflow.data.readers import open_reader

ROUNDS, BATCH = 5, 64
MEMORY = ("warm", "cold")
NUM_TOKENS, CLIP_WIDTH, T5_WIDTH = 77, 768, 4096
Batch = tuple[Posterior, Tensor, Tensor]
T = TypeVar("T")


class _Codec:
    """What a cache records of a codec; features are taken over, so its network is not run."""

    kind, checksum, factor, scale = "autoencoder_kl", "0" * 64, 8, torch.ones(1)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        return 4, size // 8, size // 8

    def encode_moments(self, images: Tensor) -> Posterior:
        return Posterior(images, images)


class _Text:
    """What a cache records of a text encoder."""

    family, checksum, width, max_length = "clip", "0" * 64, CLIP_WIDTH, NUM_TOKENS
    scale, layer, template, clean, pad_id = 1.0, None, None, False, None


@dataclass(frozen=True)
class Content:
    """What the files hold. tokens: of a caption on average, start and end included, with this standard deviation;
    everything: also the moments at 512 px and the T5 features that the released script puts into the same file;
    keep_padding: the cache is for a model that looks at the features of padding.
    """

    name: str
    tokens: float
    deviation: float
    everything: bool = False
    keep_padding: bool = False


CONTENTS = (
    Content("clip, long prompts", 40, 15),
    Content("clip, captions", 14, 4),  # as those of COCO and Flickr8k
    Content("clip, padding kept", 40, 15, keep_padding=True),
    Content("all, long prompts", 40, 15, everything=True),
    Content("all, padding kept", 40, 15, everything=True, keep_padding=True),
)
NUM_ROWS = len(CONTENTS) * len(MEMORY)


def write_released(folder: Path, count: int, content: Content) -> None:
    """Files as `extract_train_feature.py` of the release writes them, of random values."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        length = int(np.clip(rng.normal(content.tokens, content.deviation), 4, NUM_TOKENS))
        mask = (np.arange(NUM_TOKENS) < length).astype(np.int64)
        sample: dict[str, Any] = {"image_latent_256": rng.standard_normal((8, 32, 32), dtype=np.float32)}
        widths = {"clip": CLIP_WIDTH}
        if content.everything:
            sample["image_latent_512"] = rng.standard_normal((8, 64, 64), dtype=np.float32)
            widths["t5"] = T5_WIDTH
        for name, width in widths.items():
            sample[f"token_embedding_{name}"] = rng.standard_normal((NUM_TOKENS, width), dtype=np.float32)
            sample[f"token_mask_{name}"], sample[f"token_{name}"] = mask, mask
        sample["batch_caption"] = " ".join(["word"] * (length - 2))
        np.save(folder / f"{number:06d}.npy", np.array(sample, dtype=object))


def read_released(files: Sequence[Path]) -> Batch:
    """A batch the way the release reads it: every file unpickled, the arrays of one resolution and encoder stacked."""
    samples = [_unpickled(file) for file in files]
    names = ("image_latent_256", "token_embedding_clip", "token_mask_clip", "token_clip")
    moments, features, mask, _ = (torch.stack([torch.from_numpy(sample[name]) for sample in samples]) for name in names)
    mean, log_var = moments.chunk(2, dim=1)
    return Posterior(mean, log_var), features, mask.bool()


def _unpickled(file: Path) -> dict[str, Any]:
    """As numpy does it. Only files that `write_released` wrote a moment ago come here: it is what is measured."""
    with file.open("rb") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        return pickle.Unpickler(stream).load().item()


def write_cache(folder: Path, released: Path, keep_padding: bool = False) -> None:
    """The same samples as a cache, taken over from the files."""
    codec: Any = _Codec()
    text: Any = _Text()
    extractor = Extractor(Options((256,)), codec=codec, text=text, keep_padding=keep_padding)
    Builder(folder, {"all": open_reader(f"npy:{released}", "all")}, extractor, Settings()).run()


def cached_examples(folder: Path) -> Examples:
    reader = open_reader(f"cache:{folder}", "all")
    return Examples(reader, lambda item, generator: captioned_example(item, 256, generator), seed=0)


def read_cached(examples: Examples, places: Sequence[tuple[int, int]]) -> tuple[Batch, list[int]]:
    """A batch the way training reads it from a cache, and the seeds of its latents."""
    some = examples.__getitems__(list(places))
    found = cached_batch(some, 256)
    assert found is not None
    return (found.moments(), *found.text()), [one["seed"] for one in some]


def reading(
    folder: Path, count: int = 1024, rounds: int = ROUNDS, done: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """One row per content of the files and state of the system's memory of them (cold: they come from the disk); `done`
    after each row.

    Samples per second of both and their ratio, by the clock; the ratio of processor time, which a busy machine does not
    change; the ratio with the drawing of latents added to both; the ratio when the cache's features are made float32 on
    the CPU too, as training there does; and the bytes of both.
    """
    rows = []
    for place, content in enumerate(CONTENTS):
        number = count // 4 if content.everything else count
        released, cache = folder / f"released-{place}", folder / f"cache-{place}"
        write_released(released, number, content)
        write_cache(cache, released, content.keep_padding)
        sizes = [sum(path.stat().st_size for path in kind.iterdir()) / number for kind in (released, cache)]
        for memory in MEMORY:
            rows.append(
                {
                    "files": content.name,
                    "memory": memory,
                    "samples": number,
                    "mean_tokens": content.tokens,
                    **_compared(_measure(released, cache, rounds, cold=memory == "cold"), number),
                    "released_bytes_per_sample": round(sizes[0]),
                    "cached_bytes_per_sample": round(sizes[1]),
                    "bytes_ratio": round(sizes[1] / sizes[0], 3),
                }
            )
            done()
        shutil.rmtree(released)
    return rows


@dataclass
class Seconds:
    """What an epoch's reading took, on the clock and of the processor."""

    released: np.ndarray = field(default_factory=lambda: np.zeros(2))
    cached: np.ndarray = field(default_factory=lambda: np.zeros(2))
    drawing: np.ndarray = field(default_factory=lambda: np.zeros(2))
    """Drawing the latents from the moments, which both need."""
    widening: np.ndarray = field(default_factory=lambda: np.zeros(2))
    """Making cached token features float32, which the training device does."""


def _compared(epochs: Sequence[Seconds], number: int) -> dict[str, float]:
    """Samples per second by the clock, and ratios; medians over the epochs."""

    def median(what: Callable[[Seconds], float]) -> float:
        return statistics.median(what(epoch) for epoch in epochs)

    return {
        "released_samples_per_second": round(median(lambda one: number / one.released[0])),
        "cached_samples_per_second": round(median(lambda one: number / one.cached[0])),
        "ratio": round(median(lambda one: one.released[0] / one.cached[0]), 2),
        "processor_time_ratio": round(median(lambda one: one.released[1] / one.cached[1]), 2),
        "ratio_with_latents_drawn": round(
            median(lambda one: (one.released + one.drawing)[0] / (one.cached + one.drawing)[0]), 2
        ),
        "ratio_with_float32_on_cpu": round(median(lambda one: one.released[0] / (one.cached + one.widening)[0]), 2),
    }


def _measure(released: Path, cache: Path, rounds: int, cold: bool) -> list[Seconds]:
    """One entry per epoch: both read the same shuffled batches, an epoch of one after an epoch of the other, as a
    loading process would that does nothing else.
    """
    files, epochs = sorted(released.glob("*.npy")), []
    examples = cached_examples(cache)
    for epoch in range(rounds + (not cold)):
        if cold:
            examples = cached_examples(cache)  # opened anew: what is mapped stays in memory
            _forget([*files, *cache.iterdir()])
        shuffled, seconds = order(0, epoch, len(files)).tolist(), Seconds()
        batches = [shuffled[start : start + BATCH] for start in range(0, len(shuffled), BATCH)]
        for batch in batches:
            _timed(seconds.released, read_released, [files[index] for index in batch])
        for batch in batches:
            last = _timed(seconds.cached, read_cached, examples, [(epoch, index) for index in batch])
        (stored, features, _), seeds = last
        assert stored.log_var is not None
        posterior = Posterior(stored.mean.float(), stored.log_var.float())
        for _ in batches:
            _timed(seconds.drawing, draw, posterior, seeds)
            _timed(seconds.widening, features.float)
        epochs += [seconds] if cold or epoch > 0 else []  # a warm epoch is not the first
    return epochs


def _timed(seconds: np.ndarray, action: Callable[..., T], *given: Any) -> T:
    """The result of action(*given); what it took is added to `seconds`."""
    begun = np.array([time.perf_counter(), time.process_time()])
    result = action(*given)
    seconds += np.array([time.perf_counter(), time.process_time()]) - begun
    return result


def _forget(files: Iterable[Path]) -> None:
    """Asks the system to drop the files from its memory, so that they are read from the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
