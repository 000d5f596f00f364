"""Checking a whole cache: the checksum of every shard, every entry, and, given the data, every key."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.progress import Progress
from crossflow.data.cache import shards
from crossflow.data.cache.extract import STORAGE
from crossflow.data.cache.keys import KEY_BYTES, item_key
from crossflow.data.cache.store import Cache, Entry
from crossflow.data.item import BadItem
from crossflow.data.reader import Reader


@dataclass
class Report:
    """The number of items and bytes checked, and a sentence for each problem."""

    num_items: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(folder: Path, progress: Progress | None = None) -> Report:
    """Reads every byte of a cache. Raises UserError when `folder` has no finished cache."""
    cache, report = Cache(folder), Report()
    total, ids = sum(record["bytes"] for record in cache.records), set[tuple[str, str]]()
    for record in cache.records:
        for problem in _shard_problems(folder, record, cache.features, ids):
            report.problems.append(f"{record['file']}: {problem}")
        report.num_items += record["num_items"]
        report.num_bytes += record["bytes"]
        if progress is not None:
            progress(report.num_bytes, total)
    report.problems += _split_problems(cache)
    known = {record["file"] for record in cache.records}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in known:
            report.problems.append(f"{path.name}: it is in the folder but not in the manifest")
    return report


def _shard_problems(
    folder: Path, record: Mapping[str, Any], features: Mapping[str, Any], ids: set[tuple[str, str]]
) -> Iterator[str]:
    path = folder / record["file"]
    if not path.is_file():
        yield "it is missing"
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != record["sha256"]:
        yield f"its SHA-256 is {digest[:12]}…, but {record['sha256'][:12]}… is recorded"
        return
    try:
        beside = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        shard = shards.Shard(path)
    except (OSError, ValueError, UserError) as error:
        yield str(error)
        return
    if beside != record:
        yield f"{path.with_suffix('.json').name} does not agree with the manifest"
    yield from _entry_problems(shard, record, features, ids)


def _entry_problems(
    shard: shards.Shard, record: Mapping[str, Any], features: Mapping[str, Any], ids: set[tuple[str, str]]
) -> Iterator[str]:
    """The problems of the entries of a shard with the right checksum."""
    items, captions = record["num_items"], record["num_captions"]
    rows = {"ids": items, "items": items, "captions": captions}
    if "text" in features["parts"]:
        rows["text"] = captions
    for name, number in rows.items():
        end = captions if name == "items" else len(shard[name]) if name in shard else -1
        if not _are_offsets(shard, name, number, end):
            yield f"the offsets of {name} do not match its {number} entries"
            return
    for name, tensor in _expected(record, features).items():
        if name not in shard:
            yield f"{name} is missing"
        elif (tuple(shard[name].shape[1:]), shard[name].dtype, len(shard[name])) != (
            tuple(tensor.shape[1:]),
            tensor.dtype,
            shard[name].shape[0] if name == "text" else tensor.shape[0],
        ):
            yield f"{name} is {shard[name].dtype} {tuple(shard[name].shape)}"
        elif tensor.is_floating_point() and not shard[name].isfinite().all():
            yield f"{name} has values that are not finite"
    for row in range(items):
        id = shard.text("ids", row)
        if (record["split"], id) in ids:
            yield f"the id {id!r} occurs twice"
        ids.add((record["split"], id))
    for row in range(captions):
        shard.text("captions", row)


def _are_offsets(shard: shards.Shard, name: str, number: int, end: int) -> bool:
    """Whether the offsets of `name` cover `number` rows, from 0 to `end`."""
    offsets = shard.arrays.get(name + shards.OFFSETS)
    if offsets is None or len(offsets) != number + 1 or offsets[0] != 0 or offsets[-1] != end:
        return False
    return bool((offsets[1:] >= offsets[:-1]).all())


def _expected(record: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a shard must have, on the meta device."""
    items, captions, storage = record["num_items"], record["num_captions"], STORAGE[features["storage"]]

    def like(*shape: int, dtype: torch.dtype = storage) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tensors = {"keys": like(items, KEY_BYTES, dtype=torch.uint8)}
    for name, part in features["parts"].items() if items else ():
        if name.startswith("moments"):
            tensors[name] = like(items, 2 if part["spread"] else 1, *part["shape"])
        elif name == "text":
            tensors["text"] = like(0, part["width"])
            tensors["text.lengths"] = like(captions, dtype=torch.int32)
            if part["pooled"] and captions:
                tensors["text.pooled"] = like(captions, part["width"])
        else:
            tensors[name] = like(items, *part["shape"], dtype=torch.uint8 if name.startswith("pixels") else storage)
    return tensors


def _split_problems(cache: Cache) -> Iterator[str]:
    """Splits with items that are neither in the cache nor recorded as bad."""
    for split, about in cache.plan["data"].items():
        records = [record for record in cache.records if record["split"] == split]
        count = sum(record["num_items"] + len(record["bad"]) for record in records)
        if count != about["items"]:
            yield f"split {split}: {count} of {about['items']} items are accounted for"


def compare(folder: Path, readers: Mapping[str, Reader], progress: Progress | None = None) -> Report:
    """Reads the data again and compares the key of every item with that in the cache; changed items are problems."""
    cache, report = Cache(folder), Report()
    total = sum(map(len, readers.values()))
    done = 0
    for split, reader in readers.items():
        rows = cache.rows(split)
        entries = [rows[index] for index in range(len(rows))]
        keys = {cache.id(entry): _key(cache, entry) for entry in entries}
        stride = max(16, reader.batch_hint)
        for start in range(0, len(reader), stride):
            for item in reader.load(range(start, min(start + stride, len(reader)))):
                done += 1
                if isinstance(item, BadItem):
                    continue
                cached = keys.pop(item.id, None)
                if cached is None:
                    report.problems.append(f"{item.id}: it is in the data but not in the cache")
                elif cached != item_key(item, cache.features):
                    report.problems.append(f"{item.id}: its picture or captions have changed")
                report.num_items += 1
            if progress is not None:
                progress(done, total)
        report.problems += [f"{id}: it is in the cache but no longer in the data" for id in keys]
    return report


def _key(cache: Cache, entry: Entry) -> bytes:
    return cache.shard(entry.shard)["keys"][entry.row].numpy().tobytes()
