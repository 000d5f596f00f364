"""Splits of a data set: their usual names, data divided by a hash of the items' names, and subsets of a fixed size."""

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from crossflow.core.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test", "all")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def split_word(name: str) -> str:
    """`train`, `val` or `test` for the usual words for them in any case (`dev`, `Validation`), otherwise ""."""
    return next((split for split, words in SPLIT_WORDS.items() if name.lower() in words), "")


def split_folders(path: Path) -> dict[str, Path]:
    """The sub-folders of `path` that hold a split each: `train` -> path/training."""
    folders = (child for child in sorted(path.iterdir()) if child.is_dir())
    return {split_word(child.name): child for child in folders if split_word(child.name)}


def refuse_split(spec: str, split: str, there: Collection[str], why: str = "") -> None:
    """Raises UserError unless data with the splits `there` have the one that is asked for."""
    if split == "all" or split in there:
        return
    names = [name for name in SPLITS if name in there]
    has = f"has {', '.join(names)} but" if names else "has"
    take = f" Write '{spec}@{names[-1]}' to use that split instead." if names else ""
    raise UserError(f"{spec!r} {has} nothing for {split!r}{f' ({why})' if why else ''}.{take}")


def hashed_split(names: Iterable[str]) -> dict[str, str]:
    """Each name's split: 90 % train, 5 % val, 5 % test by a hash of the name alone, so new images move no old ones.

    From three names on, val and test get at least one each: the names with the highest hashes.
    """
    ranks = {
        name: int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()) / 2**64
        for name in names
    }
    splits = {name: "train" if rank < 0.90 else "val" if rank < 0.95 else "test" for name, rank in ranks.items()}
    if len(splits) >= 3:
        *_, before, last = sorted(ranks, key=lambda name: (ranks[name], name))
        splits[last] = "test"
        if "val" not in splits.values():
            splits[before] = "val"
    return splits


def split_by_hash(spec: str, names: Iterable[str], split: str) -> set[str]:
    """The names in `split` of data that bring no splits of their own; raises UserError when that leaves none."""
    names = list(names)
    if split == "all":
        return set(names)
    splits = hashed_split(names)
    counts = {word: list(splits.values()).count(word) for word in SPLIT_WORDS}
    sentence = ", ".join(f"{count} {word}" for word, count in counts.items())
    if names and not counts[split]:
        raise UserError(
            f"{spec!r} has no splits of its own, and by a hash of the names its {len(names)} items are {sentence}: "
            f"none for {split!r}. Give more items or their splits, or write '{spec}@all' to use all of them."
        )
    if len(names) < 100:
        logger.warning("%s brings no splits of its own; by a hash of the names its items are %s.", spec, sentence)
    return {name for name, where in splits.items() if where == split}


def chosen(ids: Sequence[str], limit: int, seed: int) -> list[int]:
    """The indices of `limit` ids in their order, picked by a hash of (seed, id), so that a few frames are not all of
    one scene.
    """

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}\x1f{ids[index]}".encode("utf-8", "replace"), digest_size=8).digest()

    return sorted(sorted(range(len(ids)), key=rank)[:limit])
