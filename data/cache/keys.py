"""Keys of cache entries: a hash of an item's content and of everything that determines its features.

key = BLAKE2b-128(description of the features, content): the same picture and captions under the same frozen networks
have the same key in any folder; another pixel, word, checksum, resolution or precision gives another key.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from crossflow.data.item import Item

KEY_BYTES = 16


def canonical(content: object) -> str:
    """JSON text that depends on the content alone, not on the order of keys."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def item_key(item: Item, features: Mapping[str, Any]) -> bytes:
    """The key (16 bytes) of an item whose features are described by `features` (`Extractor.describe`)."""
    digest = hashlib.blake2b(canonical(features).encode(), digest_size=KEY_BYTES)
    if item.image is not None:
        _add(digest, "image", item.image)
    for name, value in sorted((item.features or {}).items()):  # features that came with the data
        _add(digest, name, value)
    for caption in item.captions:
        text = caption.encode("utf-8")
        digest.update(b"caption %d:" % len(text) + text)
    return digest.digest()


def _add(digest: "hashlib.blake2b", name: str, array: np.ndarray) -> None:
    digest.update(f"{name} {array.dtype.str} {array.shape}:".encode())
    digest.update(np.ascontiguousarray(array).data)
