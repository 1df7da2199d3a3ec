"""What the C library does with memory that was freed.

glibc gives the top of its heap back to the kernel as soon as a few megabytes of it are free. An agent that serves peers
allocates and frees some megabytes for each round of messages: each would be given back, and be faulted in again page by
page, which took as much of the CPU as encrypting the bytes. So it is kept while peers are served, and given back after.
Source: mallopt(3), malloc_trim(3).
"""

import ctypes
from typing import Final

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 64 << 20
"""64 MiB: a message of 1 MiB in Python, in gRPC and encrypted, for more readers than a network feeds."""

_MAPPED_BYTES: Final = 4 << 20
"""What is as large as this has pages of its own all the same; smaller than that it would be cleared each time."""

_libc: Final = ctypes.CDLL(None)


def keep_freed_memory() -> None:
    """Keeps up to 64 MiB that were freed in this process; nothing where the C library has no such call."""
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)


def give_freed_memory_back() -> None:
    """Gives it to the kernel; takes a millisecond or so."""
    malloc_trim = getattr(_libc, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
