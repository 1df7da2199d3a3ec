"""Which replicas have an adapter loaded. Few picks name one, so candidates are looked up here and not grouped. Pure."""

from collections.abc import Set as AbstractSet
from typing import Final

from helios.proxy.fleet.state import Adapter, AdapterState, Change, Replica

_NOBODY: Final[frozenset[str]] = frozenset()


class Holders:
    """Replicas by adapter. Invariant: an adapter that no replica has loaded is not kept."""

    def __init__(self) -> None:
        self._holders: dict[Adapter, set[str]] = {}

    def of(self, adapter: Adapter) -> AbstractSet[str]:
        """The replicas that have it, candidates or not."""
        return self._holders.get(adapter, _NOBODY)

    def follow(self, change: Change) -> bool:
        """Follows a change of a replica; True where it has an adapter that it did not have before."""
        before, after = _loaded(change.before), _loaded(change.after)
        replica_id = change.replica.replica_id
        for adapter in before - after:
            holders = self._holders.get(adapter, set())
            holders.discard(replica_id)
            if not holders:
                self._holders.pop(adapter, None)
        for adapter in after - before:
            self._holders.setdefault(adapter, set()).add(replica_id)
        return not after <= before


def _loaded(replica: Replica | None) -> set[Adapter]:
    if replica is None or replica.state.is_gone:
        return set()
    return {held.adapter for held in replica.adapters if held.state is AdapterState.LOADED}
