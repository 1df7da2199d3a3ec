"""A token bucket as a virtual clock (GCRA), with reservations for what is known only at the end.

`_empty_at` is when all that was used will have drained: what is used now is (`_empty_at` - now) x rate. A reservation
takes room at once and drains only from its settlement on, when the true amount is known. That is what makes the bound
exact: giving back the unused end of something that has been draining since its reservation would let a later window
have more than the limit, since what had drained meanwhile was drained in place of others' use.

Bound: what is settled within any window of w seconds is at most capacity + rate x w, provided that nothing settles for
more than it reserved; what does is owed, and taken off what comes after.

Source: ITU-T I.371, the virtual scheduling algorithm.
"""

from __future__ import annotations


class Bucket:
    """What may be used within a minute: all of it at once, and again as it drains. Times in seconds.

    Invariants: `reserved` is never negative; a reservation is granted only where it fits beside all that is used and
    reserved.
    """

    def __init__(self, per_minute: int, used_up_at: float | None = None) -> None:
        """``used_up_at``: when all of it counts as used, because nobody knows what was; None: nothing was."""
        self.capacity = per_minute
        self._rate = per_minute / 60.0
        self._empty_at = used_up_at + 60.0 if used_up_at is not None else 0.0
        self._reserved = 0

    def reserve(self, amount: int, now: float) -> float:
        """Reserves an amount; returns 0, or in how many seconds to try again: then nothing was reserved.

        The wait is a guess where others' reservations are in the way. An amount above the capacity never fits.
        """
        missing = self._used(now) + self._reserved + amount - self.capacity
        # What floats lose in an hour of use is far below a millionth.
        if missing > 1e-6:
            return missing / self._rate
        self._reserved += amount
        return 0.0

    def settle(self, reserved: int, actual: int, now: float) -> None:
        """Ends a reservation: what was really used counts from now on."""
        self._reserved -= reserved
        if actual:
            self._empty_at = max(self._empty_at, now) + actual / self._rate

    def wait_seconds(self, amount: int, now: float) -> float:
        """How long an amount has to wait if all that is reserved is given back; 0: it would fit then."""
        return max(0.0, self._used(now) + amount - self.capacity) / self._rate

    def remaining(self, now: float) -> int:
        """What may be reserved now."""
        return max(0, int(self.capacity - self._used(now) - self._reserved + 1e-6))

    def reset_seconds(self, now: float) -> float:
        """When all of it is there again, if nothing more is used."""
        return max(0.0, self._empty_at - now) + self._reserved / self._rate

    def _used(self, now: float) -> float:
        return max(0.0, self._empty_at - now) * self._rate
