"""Which LoRA adapters a replica is to have, what is on the node of them, and what the replica says it has. Pure."""

from collections.abc import Sequence

from helios.worker.replica.adapter_state import AdapterFiles, AdapterState, AdapterStatus
from helios.worker.replica.settings import LoraAdapter
from helios.worker.supervisor.records import Failure


class AdapterBook:
    """One replica's adapters.

    Invariant: a revision is in ``revisions`` for as long as it is wanted or the replica names it, so that its files are
    there for as long as an engine may read them.
    """

    def __init__(self, wanted: Sequence[LoraAdapter], told: Sequence[AdapterStatus] = ()) -> None:
        """``told`` is what an adopted replica is known to have."""
        self._wanted = tuple(wanted)
        self._told: dict[LoraAdapter, AdapterStatus] = {}
        self._paths: dict[str, str] = {}
        self._failures: dict[str, Failure] = {}
        # Of a replica that was adopted by its own word alone nobody knows what is wanted, so nothing is taken from it.
        self._is_known = bool(wanted)
        self.tell(told)

    @property
    def wanted(self) -> tuple[LoraAdapter, ...]:
        """What the replica is to have."""
        return self._wanted

    @property
    def revisions(self) -> frozenset[str]:
        """Revisions that must be on the node."""
        adapters = (*self._wanted, *self._told)
        return frozenset(adapter.revision for adapter in adapters if adapter.revision)

    @property
    def paths(self) -> dict[str, str]:
        """Where the files are of what is on the node, by revision."""
        return dict(self._paths)

    @property
    def files(self) -> tuple[AdapterFiles, ...]:
        """What to say to the replica."""
        return tuple(AdapterFiles(adapter, self._paths.get(adapter.revision, "")) for adapter in self._wanted)

    @property
    def statuses(self) -> tuple[AdapterStatus, ...]:
        """Where each adapter stands, those that are being unloaded included."""
        leaving = [status.adapter for adapter, status in self._told.items() if adapter not in self._wanted]
        return (
            *(self._status(adapter) for adapter in self._wanted),
            *(AdapterStatus(adapter, AdapterState.UNLOADING) for adapter in leaving),
        )

    def want(self, adapters: Sequence[LoraAdapter]) -> bool:
        """Takes what the replica is to have; False where that is nothing new."""
        is_new = self._wanted != tuple(adapters) or not self._is_known
        self._wanted, self._is_known = tuple(adapters), True
        return is_new

    def tell(self, statuses: Sequence[AdapterStatus]) -> bool:
        """Takes what the replica says of its adapters; False where that is nothing new."""
        told = {status.adapter: status for status in statuses}
        if told == self._told:
            return False
        self._told = told
        if not self._is_known:
            self._wanted = tuple(status.adapter for status in statuses if status.state is not AdapterState.UNLOADING)
        return True

    def lent(self, revision: str, path: str) -> None:
        """Its files are on the node."""
        self._paths[revision] = path
        self._failures.pop(revision, None)

    def refused(self, revision: str, failure: Failure) -> None:
        """Its files can't be had now."""
        self._failures[revision] = failure

    def returned(self, revision: str) -> None:
        """Its files may be gone."""
        self._paths.pop(revision, None)
        self._failures.pop(revision, None)

    def _status(self, adapter: LoraAdapter) -> AdapterStatus:
        told = self._told.get(adapter)
        failure = self._failures.get(adapter.revision)
        is_missing = told is None or told.state is AdapterState.LOADING
        if is_missing and failure is not None:
            return AdapterStatus(adapter, AdapterState.FAILED, failure.reason, failure.message)
        if told is None or told.state is AdapterState.UNLOADING:
            return AdapterStatus(adapter, AdapterState.LOADING)
        return told
