"""Memory that was freed is kept while peers are served, and given back afterwards."""

import subprocess
import sys

_PROGRAM = """
import os
from helios.storage.allocator import give_freed_memory_back, keep_freed_memory

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

keep_freed_memory()
before = resident_bytes()
held = [b"x" * (1 << 20) for _ in range(32)]
held_bytes = resident_bytes() - before
del held
kept_bytes = resident_bytes() - before
give_freed_memory_back()
print(held_bytes >> 20, kept_bytes >> 20, resident_bytes() - before >> 20)
"""


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    # A process of its own: what the C library is told, it is told for good.
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    held, kept, left = map(int, done.stdout.split())
    assert held >= 32
    assert kept >= 30
    assert left <= 4
