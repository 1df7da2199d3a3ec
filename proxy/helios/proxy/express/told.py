"""What follows from a request that Envoy tells of, which it picked a replica for: as from the picker's own. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helios.proxy.catalogue import ModelEntry
    from helios.proxy.routing.prefix import Blocks
    from helios.proxy.traffic import Traffic


def take_first(
    traffic: Traffic, entry: ModelEntry, replica_id: str, request_id: str, blocks: Blocks, *, now: float
) -> None:
    """A replica was sent a request and has not told of it: a place is reserved, as by a pick.

    That counts in its score once that is made anew (`Traffic.rescore`).
    """
    traffic.retries.request(entry.name)
    if traffic.ledger.has_lapsed(request_id):
        return
    freed = traffic.ledger.reserve(request_id, replica_id, now)
    if freed is not None and freed != replica_id:
        # Two requests have one name. The first one's end will not be told of where it is.
        traffic.prompt_ended(freed, request_id)
        traffic.rescore(freed)
    traffic.prompt_sent(entry, replica_id, request_id, blocks)


def take_late(
    traffic: Traffic, entry: ModelEntry, replica_id: str, request_id: str, blocks: Blocks, *, is_retried: bool
) -> None:
    """The same of a request that a replica has told of, perhaps with its end.

    ``is_retried``: it is another one than Envoy sent the request to first.
    """
    traffic.retries.request(entry.name)
    if is_retried:
        traffic.retries.retried(entry.name)
    traffic.prompt_sent(entry, replica_id, request_id, blocks)
    if not traffic.ledger.is_running(request_id, replica_id):
        # Else it would be remembered by all of its blocks for ever.
        traffic.prompt_ended(replica_id, request_id)
