"""Splits of a data set: their names, data divided by a hash of the items' names, and subsets of a given size.

Every division depends on the names alone, so adding items moves no other item from one split to another.
"""

import hashlib
import heapq
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from crossflow.core.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test", "all")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
VAL_SHARE = 0.02  # of the training items, where the published data have no validation split


def split_word(name: str) -> str:
    """`train`, `val` or `test` for the usual words in any case (`dev`, `Validation`), otherwise ""."""
    return next((split for split, words in SPLIT_WORDS.items() if name.lower() in words), "")


def split_folders(path: Path) -> dict[str, Path]:
    """The sub-folders of `path` that hold one split each: `train` -> path/training."""
    folders = (child for child in sorted(path.iterdir()) if child.is_dir())
    return {split_word(child.name): child for child in folders if split_word(child.name)}


def require_split(spec: str, split: str, available: Collection[str], reason: str = "") -> None:
    """Raises UserError unless `split` is `all` or one of the `available` splits."""
    if split == "all" or split in available:
        return
    names = [name for name in SPLITS if name in available]
    has = f"has {', '.join(names)} but" if names else "has"
    # Never a test split in place of another one: models must not be chosen on what they are scored on.
    others = [name for name in names if name != "test"]
    if split == "val":
        advice = " Give other data for validation: data.val=SPEC."
    else:
        advice = f" To use another split, write '{spec}@{others[-1]}'." if others else ""
    raise UserError(f"{spec!r} {has} nothing for {split!r}{f' ({reason})' if reason else ''}.{advice}")


# -- validation items taken from the training split


def published_split(split: str, available: Collection[str]) -> str:
    """The published split that contains `split`: that of `val` is `train` where no validation split is published."""
    return "train" if split == "val" and "val" not in available and "train" in available else split


def select_split(ids: Sequence[str], split: str, available: Collection[str]) -> Sequence[int]:
    """The indices of the items of `split`, among the `ids` of `published_split(split, available)`.

    Where the data come with a training split and no validation split, 2 % of the training items (at least one), chosen
    by a hash of their ids, are `val` and never `train`. In all other cases every index is returned.
    """
    if "train" not in available or "val" in available or split not in ("train", "val"):
        return range(len(ids))
    return np.flatnonzero(_held_out(ids) == (split == "val")).tolist()


def _held_out(ids: Sequence[str]) -> np.ndarray:
    """bool (N,): which ids, 2 % and at least one, are held out of training for validation; none of a single id."""
    shares = _share(np.fromiter((rank(f"validation\x1f{id}") for id in ids), np.uint64, len(ids)))
    held_out = shares < VAL_SHARE
    if len(shares) > 1 and not held_out.any():
        held_out[min(np.flatnonzero(shares == shares.min()).tolist(), key=ids.__getitem__)] = True
    return held_out & (len(shares) > 1)


# -- data without splits


def hashed_split(ranks: np.ndarray, name_of: Callable[[int], str]) -> np.ndarray:
    """The positions in SPLIT_WORDS, uint8 (N,), of N names with the `rank`s uint64 (N,): 90 % train, 5 % val, 5 % test.

    From three names on, val and test have at least one each: the names with the highest ranks, and among equal ranks
    the last `name_of(index)`.
    """
    shares = _share(ranks)
    splits = np.searchsorted([0.90, 0.95], shares, side="right").astype(np.uint8)
    if len(splits) >= 3:
        highest = np.flatnonzero(shares >= np.partition(shares, -2)[-2]).tolist()
        *_, second, last = sorted(highest, key=lambda index: (shares[index], name_of(index)))
        splits[last] = 2
        if not (splits == 1).any():
            splits[second] = 1
    return splits


def expect_hashed(spec: str, counts: Mapping[str, int], split: str) -> None:
    """Raises UserError when a hash leaves no item for `split`, and warns of sets so small that shares mean little.

    counts: number of items by split.
    """
    total = sum(counts.values())
    listed = ", ".join(f"{count} {word}" for word, count in counts.items())
    if split != "all" and total and not counts[split]:
        raise UserError(
            f"{spec!r} comes without splits, and a hash of the names divides its {total} items into {listed}: "
            f"none for {split!r}. Add items, define the splits, or write '{spec}@all' to use all items."
        )
    if split != "all" and total < 100:
        logger.warning("%s comes without splits; a hash of the names divides it into %s.", spec, listed)


def hashed_members(spec: str, names: Sequence[str], split: str) -> Sequence[int] | np.ndarray:
    """The indices, ascending, of unique names in `split` of data that come without splits.

    Raises UserError when there are none.
    """
    if split == "all":
        return range(len(names))
    splits = hashed_split(np.fromiter(map(rank, names), np.uint64, len(names)), names.__getitem__)
    counts = np.bincount(splits, minlength=len(SPLIT_WORDS)).tolist()
    expect_hashed(spec, dict(zip(SPLIT_WORDS, counts, strict=True)), split)
    return np.flatnonzero(splits == list(SPLIT_WORDS).index(split))


def split_by_hash(spec: str, names: Iterable[str], split: str) -> set[str]:
    """As `hashed_members`: the names in `split`, which may be repeated."""
    unique = list(dict.fromkeys(names))
    return {unique[index] for index in hashed_members(spec, unique, split)}


def choose(ids: Sequence[str], limit: int, seed: int) -> list[int]:
    """The indices of `limit` ids, in ascending order.

    They are chosen by a hash of (seed, id), so that a few frames of a video data set come from many scenes.
    """

    def digest(index: int) -> bytes:
        return _digest(f"{seed}\x1f{ids[index]}")

    return sorted(heapq.nsmallest(limit, range(len(ids)), key=digest))


def rank(name: str) -> int:
    """A number in [0, 2^64) that depends on the name alone."""
    return int.from_bytes(_digest(name))


def _share(ranks: np.ndarray) -> np.ndarray:
    return ranks.astype(np.float64) / 2**64


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
