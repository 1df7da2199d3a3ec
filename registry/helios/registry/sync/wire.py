"""Messages of SyncService to values and back, checked: who sent them is known, and not trusted with more than that."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.mesh.errors import InvalidRequest
from helios.mesh.transfer.spans import Span
from helios.registry.sync.cluster import Agent, AgentView, Holder

MAX_ENTRIES: Final = 1_000
"""Of one inventory message: some 70 KB."""

MAX_SPANS: Final = 256
"""Of one claim."""

_MAX_HELD_SPANS: Final = 100_000
_MAX_NAME: Final = 253
_HASH: Final = re.compile(r"[0-9a-f]{64}")


def agent_from_proto(hello: pb.AgentHello) -> Agent:
    """Raises InvalidRequest (HELLO_EXPECTED) for a hello without a node."""
    if not 0 < len(hello.node) <= _MAX_NAME or len(hello.address) > _MAX_NAME:
        raise InvalidRequest("a hello names its node, in at most 253 characters", reason="HELLO_EXPECTED")
    return Agent(hello.node, hello.address, datetime.now(UTC))


def hash_from_proto(hash_: str) -> str:
    """Raises InvalidRequest (INVALID_DIGEST)."""
    if _HASH.fullmatch(hash_) is None:
        raise InvalidRequest("a blob is named by 64 lower-case hexadecimal digits", reason="INVALID_DIGEST")
    return hash_


def check_inventory(inventory: pb.Inventory) -> None:
    """Raises InvalidRequest (INVALID_DIGEST, TOO_MANY_BLOBS)."""
    lists = (inventory.blobs, inventory.gone_blobs, inventory.revisions, inventory.gone_revisions)
    if sum(map(len, lists)) > MAX_ENTRIES:
        raise InvalidRequest(f"an inventory has at most {MAX_ENTRIES} entries", reason="TOO_MANY_BLOBS")
    for hash_ in (*inventory.blobs, *inventory.gone_blobs):
        hash_from_proto(hash_)
    for revision in (*inventory.revisions, *inventory.gone_revisions):
        hash_from_proto(revision.removeprefix("sha256:"))


def spans_from_proto(spans: Iterable[pb.Span], *, limit: int = _MAX_HELD_SPANS) -> list[Span]:
    """Raises InvalidRequest (INVALID_RANGE)."""
    found = [(span.offset, span.offset + span.length) for span in spans]
    if len(found) > limit or any(start >= end for start, end in found):
        raise InvalidRequest(f"at most {limit} spans, none of them empty", reason="INVALID_RANGE")
    return found


def spans_to_proto(spans: Iterable[Span]) -> list[pb.Span]:
    """Returns spans as the contract has them."""
    return [pb.Span(offset=start, length=end - start) for start, end in spans]


def holder_to_proto(holder: Holder) -> pb.BlobHolder:
    """Returns a holder as the contract has it."""
    return pb.BlobHolder(node=holder.node, address=holder.address, is_whole=holder.is_whole)


def agent_to_proto(view: AgentView) -> pb.StorageAgent:
    """Returns an agent as the contract has it."""
    message = pb.StorageAgent(
        node=view.agent.node,
        address=view.agent.address,
        blob_count=view.blob_count,
        revision_count=view.revision_count,
        wanted_blobs=view.wanted,
    )
    message.connected_at.FromDatetime(view.agent.connected_at)
    return message
