"""The last lines of a replica's log, in few words: what it printed before it ended says more than its exit status.

Its own records are JSON, a line each; what engines, libraries and Python print is text. A traceback inside a record is
cut to its last line, which names the error.
"""

import json
from pathlib import Path
from typing import Final

_LINE_COUNT: Final = 12
_LINE_LENGTH: Final = 240
# Goes through sessions and messages to people; a dozen lines fit.
_SIZE_BYTES: Final = 2048
_READ_BYTES: Final = 32 << 10


def last_lines(path: str) -> tuple[str, ...]:
    """Returns the last lines of a log, oldest first: at most 12, and 2 KiB in all; none where it can't be read."""
    if not path:
        return ()
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _READ_BYTES))
            text = file.read(_READ_BYTES).decode(errors="replace")
    except OSError:
        return ()
    # The first line is cut where the log is longer than what was read.
    lines = text.splitlines()[1 if size > _READ_BYTES else 0 :]
    return _bounded([said for line in lines[-4 * _LINE_COUNT :] if (said := _in_words(line))])


def _in_words(line: str) -> str:
    line = line.strip()
    if line.startswith("{"):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            line = _record_in_words(record)
    printable = "".join(char if char.isprintable() else " " for char in line)
    return printable if len(printable) <= _LINE_LENGTH else printable[: _LINE_LENGTH - 1] + "…"


def _record_in_words(record: dict[str, object]) -> str:
    parts = [str(record.get("level", "info")).upper() + ":", str(record.get("message", ""))]
    parts += [str(record[key]) for key in ("reason", "error") if record.get(key)]
    raised = str(record.get("exception", "")).strip()
    if raised:
        parts.append(raised.splitlines()[-1].strip())
    return " ".join(parts)


def _bounded(lines: list[str]) -> tuple[str, ...]:
    kept: list[str] = []
    size = 0
    for line in reversed(lines[-_LINE_COUNT:]):
        size += len(line.encode()) + 1
        if size > _SIZE_BYTES:
            break
        kept.append(line)
    return tuple(reversed(kept))
