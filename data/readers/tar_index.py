"""The samples of a tar shard: where their parts lie, found by reading the headers once.

KEY.jpg, KEY.txt and KEY.json are the parts of the sample KEY, as webdataset and img2dataset write them.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from crossflow.core.files import user_cache
from crossflow.data.files import IMAGE_SUFFIXES, save_array

PARTS = ("image", "text", "json")


def shard_index(opened: Callable[[], BinaryIO], version: str) -> tuple[np.ndarray, str]:
    """(one row per sample: key, and offset and size of each part; why the rest of the shard is lost, or "").

    The index of an intact shard is kept in the user's cache directory under a digest of `version`, a text that changes
    with the shard; `opened` opens the shard, if there is none. That of a damaged shard ends with a row
    without a key.
    """
    index = user_cache() / "tar-index" / f"{hashlib.blake2b(version.encode(), digest_size=16).hexdigest()}.npy"
    try:
        rows = np.load(index, allow_pickle=False)
        if rows.dtype.names == _rows({}).dtype.names:
            return rows, ""
    except (OSError, ValueError, EOFError):
        pass  # missing or damaged: built again
    try:
        with opened() as file:
            samples, damage = _scan(file, file.seek(0, os.SEEK_END))
    except OSError as error:
        samples, damage = {}, f"the shard cannot be read: {error}"
    rows = _rows(samples, lost=bool(damage))
    if not damage:
        save_array(index, rows)
    return rows, damage


def _scan(file: BinaryIO, size: int) -> tuple[dict[str, dict[str, tuple[int, int]]], str]:
    """(key -> part -> (offset, size), in the order of the shard; why it ends early, or "")."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
                part, key = _part(member.name)
                if not part or member.type not in tarfile.REGULAR_TYPES or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    return samples, f"the shard is truncated in {member.name!r}; the samples after it are lost"
                samples.setdefault(key, {}).setdefault(part, (member.offset_data, member.size))
            end = tar.offset  # of the next header
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile accepts half a header as the end
            return samples, f"the shard lacks its end marker, after {len(samples)} samples"
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        return samples, f"the shard is damaged after {len(samples)} samples: {error}"
    return samples, ""


def _part(name: str) -> tuple[str, str]:
    """(which part of a sample a member is, or ""; the sample's key): the name up to the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    ending = ending.lower()
    part = (
        "image"
        if f".{ending}" in IMAGE_SUFFIXES
        else {"txt": "text", "caption": "text", "json": "json"}.get(ending, "")
    )
    return (part, f"{folder}{slash}{stem}".removeprefix("./")) if stem and dot else ("", "")


def _rows(samples: dict[str, dict[str, tuple[int, int]]], lost: bool = False) -> np.ndarray:
    keys = [key.encode("utf-8", "replace") for key in samples] + [b""] * lost
    dtype = [("key", f"S{max([1, *map(len, keys)])}")]
    dtype += [field for part in PARTS for field in ((part, "<u8"), (f"{part}_size", "<u8"))]
    rows = np.zeros(len(keys), dtype=dtype)
    rows["key"] = keys
    for number, parts in enumerate(samples.values()):
        for part, (offset, size) in parts.items():
            rows[part][number], rows[f"{part}_size"][number] = offset, size
    return rows
