"""Host memory that staged revisions share, and what replicas on GPUs have in it: KV blocks, adapters.

Each revision books the bytes of its files, once, however many replicas map them. A budget of its own, beside the CPU
device's: what replicas own and what lies in the page cache for everybody are different memory, and a full cache of
weights must not keep a replica from starting. What a replica has here is pinned and stays as long as it lives; staged
revisions give way to it.
"""

from helios.mesh.errors import Overloaded
from helios.worker.supervisor.ledger import NO_CAPACITY
from helios.worker.supervisor.records import HostUse


class HostLedger:
    """Bytes by revision and by replica.

    Invariant: ``book`` and ``book_replica`` never take the host over ``memory_bytes``, what is being given back left
    out; ``adopt_replica`` records a fact.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._booked: dict[str, int] = {}
        self._replicas: dict[str, int] = {}

    @property
    def free_bytes(self) -> int:
        """What nothing books."""
        return self._memory_bytes - self._booked_bytes

    def use(self) -> HostUse:
        """Returns what there is and what is booked."""
        return HostUse(self._memory_bytes, self._booked_bytes)

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

    def book_replica(self, replica_id: str, size_bytes: int, *, yielding_bytes: int = 0) -> None:
        """Books what a replica will have; ``yielding_bytes`` are booked and being given back.

        Raises:
            Overloaded: NO_CAPACITY.
        """
        free_bytes = self.free_bytes + yielding_bytes
        if size_bytes > free_bytes:
            raise Overloaded(
                f"the replica needs {size_bytes >> 20} MiB of host memory beside its device's, and"
                f" {max(free_bytes, 0) >> 20} MiB are free",
                reason=NO_CAPACITY,
                metadata={"needed_bytes": str(size_bytes), "free_bytes": str(free_bytes)},
            )
        self.adopt_replica(replica_id, size_bytes)

    def adopt_replica(self, replica_id: str, size_bytes: int) -> None:
        """Records what a replica has that runs already."""
        if size_bytes:
            self._replicas[replica_id] = size_bytes

    def release_replica(self, replica_id: str) -> None:
        """Gives back what a replica had. Idempotent."""
        self._replicas.pop(replica_id, None)

    @property
    def _booked_bytes(self) -> int:
        return sum(self._booked.values()) + sum(self._replicas.values())


def check_room(size_bytes: int, free_bytes: int) -> None:
    """Raises Overloaded (NO_CAPACITY) where weights of this size are more than what is free."""
    if size_bytes > free_bytes:
        raise Overloaded(
            f"the weights need {size_bytes >> 20} MiB of host memory, and {max(free_bytes, 0) >> 20} MiB are free"
            " to stage",
            reason=NO_CAPACITY,
            metadata={"needed_bytes": str(size_bytes), "free_bytes": str(free_bytes)},
        )
