"""The benchmark of large data measures openings, orders and workers; on sizes at which this takes seconds."""

from pathlib import Path

import pytest

from crossflow.benchmarks.speed.opening import opening_speed
from crossflow.data.index import items


@pytest.mark.slow
def test_large_data_are_opened_and_workers_keep_their_memory(tmp_path: Path, forked_pools: None) -> None:
    calls: list[int] = []
    size = items.LARGEST_IN_MEMORY // 70  # a line has some bytes more
    opened, ordered, worker = opening_speed(tmp_path, (size,), batches=100, on_row=lambda: calls.append(1))
    assert len(calls) == 3
    assert opened["items"] == size
    assert min(opened["seconds"], opened["seconds_to_index"]) > 0
    assert opened["private_megabytes"] < 10
    assert ordered["seconds"] > 0
    assert worker["private_megabytes"] < worker["private_megabytes_after_a_tenth"] + 3
