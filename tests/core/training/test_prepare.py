"""Preparations before the first step."""

import resource
import sys

import pytest
import torch

from crossflow.core.config import TrainConfig
from crossflow.core.errors import UserError
from crossflow.core.training.prepare import check_sharding, compiles, keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is a function of Linux's C library")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library cannot be told to keep memory")
    torch.ones(4 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4 * 2**20)  # 16 MiB, 4096 pages
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 4096


def test_only_gpus_that_torch_can_compile_for_compile_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for spec, expected in ((None, False), (object(), True)):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        assert (compiles(TrainConfig(), cpu), compiles(TrainConfig(), gpu)) == (False, expected)
        assert not compiles(TrainConfig(sharding="fsdp"), gpu)
        assert (compiles(TrainConfig(compile=True), cpu), compiles(TrainConfig(compile=False), gpu)) == (True, False)


def test_eight_bit_averages_are_not_sharded() -> None:
    with pytest.raises(UserError, match=r"not those of adamw8bit"):
        check_sharding(TrainConfig(sharding="fsdp", optimizer="adamw8bit"), reads_trained_weights=False)
