"""What a replica's processes really take, beside what was booked for them.

Private memory is what goes when the tree goes. Pages that it shares with the launcher it was forked from are the
launcher's; weights that are mapped from a blob are the page cache's and belong to the node. So of each process the
dirty private pages count: anonymous memory that was written, and nothing of files. (A clean private page of a file is
one that happens to be mapped once.)
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

_COUNTED: Final = ("Private_Dirty:", "Private_Hugetlb:")


def private_bytes(pids: Iterable[int], proc: Path = Path("/proc")) -> int:
    """Sums the private memory of processes; one that is gone meanwhile counts nothing. Blocks for milliseconds."""
    return sum(_private_bytes(proc / str(pid) / "smaps_rollup") for pid in pids)


def _private_bytes(file: Path) -> int:
    try:
        lines = file.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(_COUNTED))
