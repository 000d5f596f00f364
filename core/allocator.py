"""The memory that a process on the CPU has freed, and what becomes of it."""

import ctypes
import sys
from functools import cache

# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@cache
def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for this process instead of returning it; whether it could (glibc only).

    Every step of training or sampling on the CPU allocates the same sizes. Returned to the system and mapped again,
    their pages have to be cleared each time, which takes 10 to 25 % of a training step.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is None:
        return False
    # Large blocks come from the heap too, and not from mappings of their own, which end when they are freed.
    return bool(adjust(_M_TRIM_THRESHOLD, -1)) and bool(adjust(_M_MMAP_MAX, 0))
