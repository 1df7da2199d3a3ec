"""Prefetches as the command line sees them: values in and out, HeliosError on failure."""

from dataclasses import dataclass
from typing import Final

from helios.api.registry.v1 import prefetch_service_pb2 as pb
from helios.api.registry.v1 import sync_service_pb2
from helios.api.registry.v1.prefetch_service_pb2_grpc import PrefetchServiceStub
from helios.mesh.calls import answer_of
from helios.mesh.channel import StubSource

_TIMEOUT_SECONDS: Final = 10.0
_STATE_PREFIX: Final = "PREFETCH_STATE_"


@dataclass(frozen=True, slots=True)
class PrefetchAsked:
    """Which nodes are asked for a revision, and which have it."""

    revision: str
    size_bytes: int
    asked_nodes: tuple[str, ...]
    holding_nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PrefetchOrder:
    """A revision that a node is to fetch: why, and what became of it: waiting, fetching, here, failed, or unknown."""

    revision: str
    size_bytes: int
    is_asked: bool
    reason: str
    state: str
    message: str


@dataclass(frozen=True, slots=True)
class NodePrefetches:
    """What a node is to fetch ahead, and bytes since its agent started: fetched, and of that used and wasted.

    ``budget_bytes`` is what may be ordered in this hour still, ``agent_budget_bytes`` what its agent would fetch.
    """

    node: str
    orders: tuple[PrefetchOrder, ...]
    fetched_bytes: int
    used_bytes: int
    wasted_bytes: int
    budget_bytes: int
    agent_budget_bytes: int


class PrefetchClient:
    """Calls on one registry. The dialer stays the caller's."""

    def __init__(self, dialer: StubSource) -> None:
        self._dialer = dialer

    async def prefetch(self, model: str, *, node: str = "", is_dry: bool = False) -> PrefetchAsked:
        """Has a node, or all, fetch a model; waits for none. Raises ModelNotFound, NotFound (NODE_NOT_FOUND)."""
        request = pb.PrefetchModelRequest(model=model, node=node, dry_run=is_dry)
        answer = await answer_of(self._stub().PrefetchModel(request, timeout=_TIMEOUT_SECONDS))
        return PrefetchAsked(answer.revision, answer.size_bytes, tuple(answer.asked_nodes), tuple(answer.holding_nodes))

    async def list(self) -> tuple[NodePrefetches, ...]:
        """Returns what nodes fetch ahead, by node."""
        answer = await answer_of(self._stub().ListPrefetches(pb.ListPrefetchesRequest(), timeout=_TIMEOUT_SECONDS))
        return tuple(map(_node_from_proto, answer.nodes))

    def _stub(self) -> PrefetchServiceStub:
        return self._dialer.stub(PrefetchServiceStub)


def _node_from_proto(message: pb.NodePrefetches) -> NodePrefetches:
    outcomes = {outcome.revision: outcome for outcome in message.report.outcomes}
    return NodePrefetches(
        node=message.node,
        orders=tuple(_order_from_proto(order, outcomes.get(order.revision)) for order in message.plan.orders),
        fetched_bytes=message.report.fetched_bytes,
        used_bytes=message.report.used_bytes,
        wasted_bytes=message.report.wasted_bytes,
        budget_bytes=message.budget_bytes,
        agent_budget_bytes=message.report.budget_bytes,
    )


def _order_from_proto(
    order: sync_service_pb2.PrefetchOrder, outcome: sync_service_pb2.PrefetchOutcome | None
) -> PrefetchOrder:
    names = {value: name for name, value in sync_service_pb2.PrefetchState.items()}
    state = names.get(outcome.state, "").removeprefix(_STATE_PREFIX).lower() if outcome is not None else "unknown"
    message = outcome.message if outcome is not None else ""
    return PrefetchOrder(order.revision, order.size_bytes, order.is_asked, order.reason, state, message)
