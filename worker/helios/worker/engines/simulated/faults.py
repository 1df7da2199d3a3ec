"""What goes wrong, and when, out of a seed: the same seed and the same order of requests give the same failures."""

import enum
import random
from collections.abc import Mapping

from helios.worker.engines.simulated.settings import SimulatedOptions


class Fault(enum.Enum):
    """What may happen at a token: the request fails, everything stands still, the engine dies."""

    ERROR = "error"
    STALL = "stall"
    DEATH = "death"


Fate = Mapping[Fault, int]
"""What happens to a request: each fault with the token of its first answer, counted from 0, at which it comes."""


class Faults:
    """Draws the failures of one engine. A request's fate depends on its number alone, not on what runs beside it."""

    def __init__(self, options: SimulatedOptions) -> None:
        self._options = options

    def has_failed_start(self, replica_id: str) -> bool:
        """Returns whether the start of a replica fails."""
        return self._chance("start", replica_id).random() < self._options.start_failure_ratio

    def has_failed_compile(self, replica_id: str) -> bool:
        """Returns whether compiling fails in the start of a replica."""
        return self._chance("compile", replica_id).random() < self._options.compile_failure_ratio

    def fate(self, number: int, token_count: int) -> Fate:
        """Returns the fate of the request with this number, counted from 1, whose answer has so many tokens."""
        options, chance = self._options, self._chance("request", number)
        # Drawn in this order whatever is switched on, so that one option does not move another's draws.
        is_error, is_stall = chance.random() < options.error_ratio, chance.random() < options.stall_ratio
        error_at, stall_at, death_at = (chance.randrange(token_count) for _ in range(3))
        fate = {Fault.ERROR: error_at, Fault.STALL: stall_at, Fault.DEATH: death_at}
        happens = {Fault.ERROR: is_error, Fault.STALL: is_stall, Fault.DEATH: number == options.death_after_requests}
        return {fault: at for fault, at in fate.items() if happens[fault]}

    def wake(self, number: int) -> tuple[bool, bool]:
        """Returns whether the wake with this number, counted from 1, fails, and whether its weights are wrong."""
        options, chance = self._options, self._chance("wake", number)
        return chance.random() < options.wake_failure_ratio, chance.random() < options.wrong_weights_ratio

    def jitter(self, step: int) -> float:
        """Returns the factor of a step's time."""
        ratio = self._options.jitter_ratio
        return 1.0 if ratio == 0 else self._chance("step", step).uniform(1 - ratio, 1 + ratio)

    def _chance(self, what: str, which: int | str) -> random.Random:
        return random.Random(f"{self._options.seed}/{what}/{which}")  # noqa: S311  repeatable, and nothing secret
