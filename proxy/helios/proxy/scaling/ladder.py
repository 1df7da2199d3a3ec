"""How warm a model is kept that nobody uses, as time goes on: ready, asleep, staged in memory, on disk. Pure.

Each rung has its own cooldown: a replica holds a device, one that sleeps holds host memory and processes, staged
weights hold host memory, a disk next to nothing. What a forecast expects holds a model up: it never goes below the
rung that is wanted for that.
"""

from dataclasses import dataclass
from enum import IntEnum


class Rung(IntEnum):
    """How warm, the coldest first."""

    DISK = 1
    STAGED = 2
    ASLEEP = 3
    READY = 4


@dataclass(frozen=True, slots=True)
class Cooldowns:
    """How long a model stays on each rung without a request, in seconds; 0 is for ever, or until room is needed.

    Attributes:
        idle_seconds: with replicas that take requests.
        asleep_seconds: with replicas that sleep.
        staged_seconds: with its weights in host memory.
    """

    idle_seconds: float = 900.0
    asleep_seconds: float = 1800.0
    staged_seconds: float = 0.0


def rung_after(unused_seconds: float, cooldowns: Cooldowns, floor: Rung = Rung.DISK) -> Rung:
    """Returns the rung that a model which nobody has used for so long may still have; never one below `floor`."""
    left = unused_seconds
    spans = (cooldowns.idle_seconds, cooldowns.asleep_seconds, cooldowns.staged_seconds)
    for rung, seconds in zip((Rung.READY, Rung.ASLEEP, Rung.STAGED), spans, strict=True):
        if not seconds or left < seconds:
            return max(rung, floor)
        left -= seconds
    return max(Rung.DISK, floor)
