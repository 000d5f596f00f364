"""Runs of these tests do not wait for the disk."""

import pytest


@pytest.fixture(autouse=True)
def _no_waiting(no_fsync: None) -> None: ...
