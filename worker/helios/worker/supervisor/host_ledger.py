"""Host memory that staged revisions share: each books the bytes of its files, once, however many replicas map them.

A budget of its own, beside the CPU device's: what replicas own and what lies in the page cache for everybody are
different memory, and a full cache of weights must not keep a replica from starting.
"""

from helios.mesh.errors import Overloaded
from helios.worker.supervisor.ledger import NO_CAPACITY
from helios.worker.supervisor.records import HostUse


class HostLedger:
    """Bytes by revision. Invariant: ``book`` never takes the host over ``memory_bytes``."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._booked: dict[str, int] = {}

    @property
    def free_bytes(self) -> int:
        """What nothing books."""
        return self._memory_bytes - sum(self._booked.values())

    def use(self) -> HostUse:
        """Returns what there is and what is booked."""
        return HostUse(self._memory_bytes, sum(self._booked.values()))

    def book(self, revision: str, size_bytes: int) -> None:
        """Books a revision, or corrects what it booked.

        Raises:
            Overloaded: NO_CAPACITY; what it booked before stays.
        """
        check_room(size_bytes, self.free_bytes + self._booked.get(revision, 0))
        self._booked[revision] = size_bytes

    def release(self, revision: str) -> None:
        """Gives back what a revision booked. Idempotent."""
        self._booked.pop(revision, None)


def check_room(size_bytes: int, free_bytes: int) -> None:
    """Raises Overloaded (NO_CAPACITY) where weights of this size are more than what is free."""
    if size_bytes > free_bytes:
        raise Overloaded(
            f"the weights need {size_bytes >> 20} MiB of host memory, and {max(free_bytes, 0) >> 20} MiB are free"
            " to stage",
            reason=NO_CAPACITY,
            metadata={"needed_bytes": str(size_bytes), "free_bytes": str(free_bytes)},
        )
