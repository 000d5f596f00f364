"""The environment that a launcher (accelerate launch, torchrun) sets for each process; read without communicating."""

import os


def world_size() -> int:
    """The number of processes that were started together, at least 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes that were started together on this machine, at least 1."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among all of them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def has_agent() -> bool:
    """Whether the launcher's own process holds the store by which the processes find each other."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
