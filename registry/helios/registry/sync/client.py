"""Storage agents as the command line sees them: values out, HeliosError on failure."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.api.registry.v1.sync_service_pb2_grpc import SyncServiceStub
from helios.mesh.calls import answer_of
from helios.mesh.channel import StubSource

_TIMEOUT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class StorageAgent:
    """An agent that is connected. ``address`` empty: other nodes don't reach it; ``wanted_blobs``: what it fetches."""

    node: str
    address: str
    connected_at: datetime
    blob_count: int
    revision_count: int
    wanted_blobs: tuple[str, ...]


class SyncClient:
    """Calls on one registry. The dialer stays the caller's."""

    def __init__(self, dialer: StubSource) -> None:
        self._dialer = dialer

    async def list_agents(self) -> tuple[StorageAgent, ...]:
        """Returns the agents that are connected to this registry, by node."""
        stub = self._dialer.stub(SyncServiceStub)
        answer = await answer_of(stub.ListAgents(pb.ListAgentsRequest(), timeout=_TIMEOUT_SECONDS))
        return tuple(
            StorageAgent(
                agent.node,
                agent.address,
                agent.connected_at.ToDatetime(UTC),
                agent.blob_count,
                agent.revision_count,
                tuple(agent.wanted_blobs),
            )
            for agent in answer.agents
        )
