"""Preparations before the first step."""

import resource
import sys

import pytest
import torch

from crossflow.core.training.prepare import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is a function of Linux's C library")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    if not keep_freed_memory():
        pytest.skip("this C library cannot be told to keep memory")
    torch.ones(4 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4 * 2**20)  # 16 MiB, 4096 pages
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2 * 4096  # of 10 x 4096
