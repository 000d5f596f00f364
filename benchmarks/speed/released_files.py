"""Features in files as the released scripts write them: one pickled dictionary per sample.

B batch, N tokens, D width.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossflow.core.source import Posterior

NUM_TOKENS, CLIP_WIDTH, T5_WIDTH = 77, 768, 4096
Batch = tuple[Posterior, Tensor, Tensor]
"""Moments (B, C, h, w), token features (B, N, D), mask (B, N)."""


@dataclass(frozen=True)
class Content:
    """What the files contain."""

    name: str
    tokens: float
    """Mean number of tokens of a caption, start and end included."""
    deviation: float
    """Standard deviation of that number."""
    everything: bool = False
    """Also the moments at 512 px and the T5 features, which the released script writes into the same file."""
    keep_padding: bool = False
    """The cache is for a model that attends to the features of padding."""
    image_size: int = 256
    """Of the moments."""
    width: int = CLIP_WIDTH
    """Of the CLIP features."""


CONTENTS = (
    Content("clip, long prompts", 40, 15),
    Content("clip, captions", 14, 4),  # the length of those of COCO and Flickr8k
    Content("clip, padding kept", 40, 15, keep_padding=True),
    Content("all, long prompts", 40, 15, everything=True),
    Content("all, padding kept", 40, 15, everything=True, keep_padding=True),
)


def write_released(folder: Path, count: int, content: Content) -> None:
    """Writes `count` files of random values as `extract_train_feature.py` of the release does."""
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        length = int(np.clip(rng.normal(content.tokens, content.deviation), 4, NUM_TOKENS))
        mask = (np.arange(NUM_TOKENS) < length).astype(np.int64)
        sizes = [content.image_size, *([512] if content.everything else [])]
        sample: dict[str, Any] = {
            f"image_latent_{size}": rng.standard_normal((8, size // 8, size // 8), dtype=np.float32) for size in sizes
        }
        widths = {"clip": content.width}
        if content.everything:
            widths["t5"] = T5_WIDTH
        for name, width in widths.items():
            sample[f"token_embedding_{name}"] = rng.standard_normal((NUM_TOKENS, width), dtype=np.float32)
            sample[f"token_mask_{name}"], sample[f"token_{name}"] = mask, mask
        sample["batch_caption"] = " ".join(["word"] * (length - 2))
        np.save(folder / f"{number:06d}.npy", np.array(sample, dtype=object))


def read_released(files: Sequence[Path], image_size: int = 256) -> Batch:
    """A batch as the release reads it: every file unpickled, the arrays of one resolution and encoder stacked."""
    samples = [_unpickled(file) for file in files]
    names = (f"image_latent_{image_size}", "token_embedding_clip", "token_mask_clip", "token_clip")
    moments, features, mask, _ = (torch.stack([torch.from_numpy(sample[name]) for sample in samples]) for name in names)
    mean, log_var = moments.chunk(2, dim=1)
    return Posterior(mean, log_var), features, mask.bool()


def _unpickled(file: Path) -> dict[str, Any]:
    """Unpickles a file as numpy does. This is what is measured, on files that `write_released` has just written."""
    with file.open("rb") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        return pickle.Unpickler(stream).load().item()
