"""The logs of a mesh on one machine: kept to a bounded size while their writers hold them open, and read at their end.

Everything that writes there appends (O_APPEND), Envoy's access log too: a file that is cut to nothing is written on
from its start, so that no writer has to be told. What is written between the copy and the cut is lost: some lines at
most.
"""

import asyncio
import shutil
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

# With the one old file that is kept, a process's logs take 100 MiB at most.
LIMIT_BYTES: Final = 50 << 20
_CHECK_SECONDS: Final = 10.0
_TAIL_BYTES: Final = 64 << 10
# What is read at a time of a log that grew while nobody looked.
_READ_BYTES: Final = 1 << 20


async def rotate_forever(directory: Path) -> None:
    """Keeps the logs of a directory bounded, until cancelled."""
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        for path in directory.glob("*.log"):
            await asyncio.to_thread(rotate, path)


def rotate(path: Path, *, limit_bytes: int = LIMIT_BYTES) -> bool:
    """Moves a log's content to ``<name>.log.1`` where it is beyond the limit; returns whether it was. Blocking.

    On a full disk the old lines go, for their room is needed.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return False
    except FileNotFoundError:
        return False
    old = path.with_suffix(".log.1")
    try:
        shutil.copyfile(path, old)
    except OSError as error:
        old.unlink(missing_ok=True)
        log.warning("old log lines dropped", path=str(path), error=str(error))
    with path.open("r+b") as file:
        file.truncate()
    return True


def tail(path: Path, line_count: int) -> str:
    """Returns the last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-line_count:])
    except OSError:
        return ""


def read_lines(path: Path, position: int) -> tuple[list[str], int]:
    """Returns the whole lines after a position, and the position after them; a log that was cut is read anew."""
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < position:
                position = 0
            file.seek(position)
            content = file.read(_READ_BYTES)
    except FileNotFoundError:
        return [], 0
    # A line that is longer than the buffer is given in parts, else it would never come.
    whole = content if len(content) == _READ_BYTES and b"\n" not in content else content[: content.rfind(b"\n") + 1]
    return whole.decode("utf-8", "replace").splitlines(), position + len(whole)
