"""The phases of a start: measured stretches of time, laid out so that nothing hides in a neighbour.

Whoever does a piece of the start measures its beginning and its end, in any process of the replica, and writes both to
a pipe. The timeline gives each moment to one phase, the first that was added; what no phase covers is `unexplained`, a
row of its own. So the rows add up to the whole, and a piece that nobody measures can't pass for another.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

UNEXPLAINED: Final = "unexplained"


class Timeline:
    """Phases of one start, in seconds of CLOCK_MONOTONIC, which is one clock for all processes of a machine. Pure."""

    def __init__(self, began_at: float) -> None:
        self._covered_until = began_at
        self._uncovered_seconds = 0.0

    def add(self, began_at: float, ended_at: float) -> float:
        """Returns the seconds that a piece of work took on the way: 0 for what was over before another was."""
        began_at = max(began_at, self._covered_until)
        if ended_at <= began_at:
            return 0.0
        self._uncovered_seconds += began_at - self._covered_until
        self._covered_until = ended_at
        return ended_at - began_at

    def close(self, ended_at: float) -> float:
        """Returns the seconds that nothing covers, up to ``ended_at``."""
        return self._uncovered_seconds + max(0.0, ended_at - self._covered_until)


def write_phase(descriptor: int, name: str, began_at: float, ended_at: float) -> None:
    """Writes a phase that is over to the replica's pipe. A pipe write below 4 KiB is atomic.

    A negative descriptor is none: a process that was spawned inherits no pipe.
    """
    if descriptor >= 0:
        os.write(descriptor, json.dumps([name, began_at, ended_at]).encode() + b"\n")


@contextmanager
def measured(descriptor: int, name: str) -> Iterator[None]:
    """Writes how long the block took, unless it fails."""
    began_at = time.monotonic()
    yield
    write_phase(descriptor, name, began_at, time.monotonic())
