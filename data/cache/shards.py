"""Shards: the features of several hundred items in one safetensors file, written atomically and memory-mapped.

Rows of equal shape form one tensor. Rows of varying length (`ids`, `captions`, token features) are concatenated, and
row i of `x` is x[x.offsets[i] : x.offsets[i + 1]], so nothing is padded. A JSON file beside each shard, written after
it, describes the content: a shard without one is unfinished.
"""

import hashlib
import json
import math
import mmap
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.files import encode_tensors, is_full, size_in_words, write_atomically

DTYPES = {  # numpy has no bfloat16; its bits are kept in integers
    "F32": (torch.float32, np.float32),
    "F16": (torch.float16, np.float16),
    "BF16": (torch.bfloat16, np.int16),
    "I64": (torch.int64, np.int64),
    "I32": (torch.int32, np.int32),
    "U8": (torch.uint8, np.uint8),
}
OFFSETS = ".offsets"
LARGEST_HEADER = 2**24


def pack_texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The concatenated UTF-8 bytes of texts (uint8), and the offsets (len + 1,) int64 of each text."""
    encoded = [text.encode("utf-8") for text in texts]
    joined = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
    return joined, offsets([len(text) for text in encoded])


def offsets(lengths: Iterable[int]) -> Tensor:
    """(len + 1,) int64: 0 and the running sums of `lengths`."""
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64))


def write_shard(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a shard and then the JSON file that marks it as finished; returns the content of that file.

    The same tensors give the same bytes. Raises UserError when the disk is full.
    """
    content = encode_tensors(tensors)
    record = {
        "file": path.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **about,
    }
    write_bytes(path, content)
    write_bytes(path.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False).encode())
    return record


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically, safe against loss of power. Raises UserError when the disk is full."""
    try:
        write_atomically(path, content)
    except OSError as error:
        if is_full(error):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"The disk is full: {path} of {size_in_words(len(content))} did not fit ({size_in_words(free)} free). "
                "Finished shards are kept; free some space and repeat the command to continue."
            ) from error
        raise


class Shard:
    """The memory-mapped tensors of a shard: `shard["moments_256"]`. Raises UserError for a damaged file.

    `arrays` holds the same data as numpy arrays, whose single rows are copied faster, and `dtypes` their torch types.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.arrays: dict[str, np.ndarray] = {}
            self.dtypes: dict[str, torch.dtype] = {}
            self._places: dict[str, tuple[int, int]] = {}  # name -> bytes of a row, where the first begins
            self._read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"The shard {path} cannot be read ({error}); check the cache with --verify.") from error

    def will_need(self, name: str, begin: int, end: int) -> None:
        """Asks the system to read rows begin ... end - 1 of a tensor from disk, without waiting."""
        row, start = self._places[name]
        first = (start + begin * row) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, first, start + end * row - first)

    def _read(self) -> None:
        length = int.from_bytes(self._map[:8], "little")
        if not 0 < length <= LARGEST_HEADER:
            raise ValueError("no safetensors header")
        header = json.loads(self._map[8 : 8 + length])
        whole = np.frombuffer(self._map, np.uint8)[8 + length :]
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            if not 0 <= begin <= end <= len(whole) or end - begin != dtype[0].itemsize * math.prod(shape):
                raise ValueError(f"tensor {name} lies outside of the file")
            self.arrays[name] = whole[begin:end].view(dtype[1]).reshape(shape)
            self.dtypes[name] = dtype[0]
            self._places[name] = (dtype[0].itemsize * math.prod(shape[1:]), 8 + length + begin)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name`, backed by the file."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the map is read-only, and the tensor is never written to
            return torch.from_numpy(self.arrays[name]).view(self.dtypes[name])

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def span(self, name: str, row: int) -> tuple[int, int]:
        """The bounds (begin, end) of row `row` in the concatenated tensor `name`."""
        begin, end = self.arrays[name + OFFSETS][row : row + 2].tolist()
        return begin, end

    def text(self, name: str, row: int) -> str:
        """Text `row` of `ids` or `captions`."""
        begin, end = self.span(name, row)
        return self.arrays[name][begin:end].tobytes().decode("utf-8")

    def captions(self, row: int) -> range:
        """The rows of the captions of item `row`."""
        return range(*self.span("items", row))
