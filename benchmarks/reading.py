"""How fast training reads features: a cache beside one pickled file per sample, as the released scripts write them.

Both hold the same samples and give the same batches on the CPU, in a shuffled order and one process: moments
(B, C, h, w) float32, token features (B, N, D) with their padding, mask. The cache's features stay in the type they are
stored in, half precision, which becomes float32 on the training device. B batch, N tokens, D width.
"""

import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from crossflow.core.noise import order
from crossflow.core.source import Posterior
from crossflow.tasks.common.cache.build import Builder, Settings
from crossflow.tasks.common.cache.extract import Extractor, Options
from crossflow.tasks.common.cache.training import gathered
from crossflow.tasks.common.dataset import Examples
from crossflow.tasks.common.image_latents import draw
from crossflow.tasks.common.readers import open_reader
from crossflow.tasks.t2i.dataset import example

ROUNDS, BATCH = 5, 64
CONTENTS, MEMORY = ("clip", "all"), ("warm", "cold")
NUM_ROWS = len(CONTENTS) * len(MEMORY)
MEAN_TOKENS, SPREAD = 40, 15  # of prompts such as JourneyDB's, start and end tokens included; COCO's have about 13
NUM_TOKENS, CLIP_WIDTH, T5_WIDTH = 77, 768, 4096
Batch = tuple[Posterior, Tensor, Tensor]
T = TypeVar("T")


class _Network:
    """What a cache records of a network; features are taken over, so none is run."""

    kind, family, checksum, factor = "autoencoder_kl", "clip", "0" * 64, 8
    width, max_length = CLIP_WIDTH, NUM_TOKENS
    scale, layer, template, clean, pad_id = 1.0, None, None, False, None

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        return 4, size // 8, size // 8

    def encode_moments(self, images: Tensor) -> Posterior:
        return Posterior(images, images)

    def tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return torch.zeros(0), torch.ones(len(captions), MEAN_TOKENS)


def write_released(folder: Path, count: int, everything: bool) -> None:
    """Files as `extract_train_feature.py` of the release writes them, of random values.

    everything: also the moments at 512 px and the T5 features that it puts into the same file.
    """
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        length = int(np.clip(rng.normal(MEAN_TOKENS, SPREAD), 4, NUM_TOKENS))
        mask = (np.arange(NUM_TOKENS) < length).astype(np.int64)
        content: dict[str, Any] = {"image_latent_256": rng.standard_normal((8, 32, 32), dtype=np.float32)}
        widths = {"clip": CLIP_WIDTH}
        if everything:
            content["image_latent_512"] = rng.standard_normal((8, 64, 64), dtype=np.float32)
            widths["t5"] = T5_WIDTH
        for name, width in widths.items():
            content[f"token_embedding_{name}"] = rng.standard_normal((NUM_TOKENS, width), dtype=np.float32)
            content[f"token_mask_{name}"], content[f"token_{name}"] = mask, mask
        content["batch_caption"] = " ".join(["word"] * (length - 2))
        np.save(folder / f"{number:06d}.npy", np.array(content, dtype=object))


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


def write_cache(folder: Path, released: Path) -> None:
    """The same samples as a cache, taken over from the files."""
    network: Any = _Network()
    extractor = Extractor(Options((256,)), codec=network, text=network)
    Builder(folder, {"all": open_reader(f"npy:{released}", "all")}, extractor, Settings()).run()


def cached_examples(folder: Path) -> Examples:
    reader = open_reader(f"cache:{folder}", "all")
    return Examples(reader, lambda item, generator: example(item, 256, generator), seed=0)


def read_cached(examples: Examples, places: Sequence[tuple[int, int]]) -> tuple[Batch, list[int]]:
    """A batch the way training reads it from a cache, and the seeds of its latents."""
    some = examples.__getitems__(list(places))
    found = gathered(some, 256)
    assert found is not None
    return (found.moments(), *found.text()), [one["seed"] for one in some]


def reading(
    folder: Path, count: int = 1024, rounds: int = ROUNDS, done: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """One row per way the files are written (clip: moments at 256 px and CLIP features alone; all: as the script writes
    them) and state of the system's memory of files; `done` after each row.

    Samples per second of both, the ratio, the ratio with the drawing of latents added to both, the ratio when the
    cache's features are made float32 on the CPU too, as training there does, and the bytes of both.
    """
    rows = []
    for content, number in zip(CONTENTS, (count, count // 4), strict=True):
        released, cache = folder / f"released-{content}", folder / f"cache-{content}"
        write_released(released, number, content == "all")
        write_cache(cache, released)
        sizes = [sum(path.stat().st_size for path in place.iterdir()) // number for place in (released, cache)]
        for memory in MEMORY:
            theirs, ours, drawing, widening = _measure(released, cache, rounds, cold=memory == "cold")
            rows.append(
                {
                    "files": content,
                    "memory": memory,
                    "samples": number,
                    "mean_tokens": MEAN_TOKENS,
                    "released_samples_per_second": round(BATCH / theirs),
                    "cached_samples_per_second": round(BATCH / ours),
                    "ratio": round(theirs / ours, 2),
                    "ratio_with_latents_drawn": round((theirs + drawing) / (ours + drawing), 2),
                    "ratio_with_float32_on_cpu": round(theirs / (ours + widening), 2),
                    "released_bytes_per_sample": sizes[0],
                    "cached_bytes_per_sample": sizes[1],
                    "bytes_ratio": round(sizes[1] / sizes[0], 3),
                }
            )
            done()
    return rows


def _measure(released: Path, cache: Path, rounds: int, cold: bool) -> tuple[float, ...]:
    """Median seconds of a batch: released, cached, the drawing of its latents, which both need, and the making of
    float32 features.

    Both read the same batches of a shuffled epoch in turns, so that whatever else the machine does meets both alike.
    """
    files = sorted(released.glob("*.npy"))
    seconds: list[tuple[float, ...]] = []
    examples = cached_examples(cache)
    for epoch in range(rounds + (not cold)):
        if cold:
            examples = cached_examples(cache)  # opened anew: what is mapped stays in memory
            _forget([*files, *cache.iterdir()])
        shuffled = order(0, epoch, len(files)).tolist()
        measured = []
        for start in range(0, len(shuffled) - BATCH + 1, BATCH):
            batch = shuffled[start : start + BATCH]
            theirs, _ = _timed(read_released, [files[index] for index in batch])
            ours, ((posterior, features, _), seeds) = _timed(read_cached, examples, [(epoch, index) for index in batch])
            measured.append((theirs, ours, _timed(draw, posterior, seeds)[0], _timed(features.float)[0]))
        seconds += measured if cold or epoch > 0 else []  # a warm epoch is not the first
    return tuple(statistics.median(column) for column in zip(*seconds, strict=True))


def _timed(action: Callable[..., T], *given: Any) -> tuple[float, T]:
    begun = time.perf_counter()
    result = action(*given)
    return time.perf_counter() - begun, result


def _forget(files: Iterable[Path]) -> None:
    """Asks the system to drop the files from its memory, so that they are read from the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
