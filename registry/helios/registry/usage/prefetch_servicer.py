"""PrefetchService over the prefetches: validation, permissions, and nothing else."""

from typing import Any

from helios.api.registry.v1 import prefetch_service_pb2 as pb
from helios.api.registry.v1.prefetch_service_pb2_grpc import PrefetchServiceServicer, PrefetchServiceStub
from helios.registry import access
from helios.registry.names import check_name
from helios.registry.store import Store
from helios.registry.sync.servicer import SyncServicer
from helios.registry.usage.prefetch_wire import plan_to_proto
from helios.registry.usage.prefetches import NodeView, Prefetches


class PrefetchServicer(PrefetchServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, prefetches: Prefetches, store: Store, agents: SyncServicer) -> None:
        """Takes the sessions of agents besides, which may be another registry's."""
        self._prefetches = prefetches
        self._store = store
        self._agents = agents

    async def PrefetchModel(self, request: pb.PrefetchModelRequest, context: Any) -> pb.PrefetchModelResponse:
        """Has nodes fetch a model."""
        access.check_may_order(context)
        elsewhere: pb.PrefetchModelResponse | None = await self._agents.relay.ask(
            context, PrefetchServiceStub, lambda stub: stub.PrefetchModel, request
        )
        if elsewhere is not None:
            return elsewhere
        model = await self._store.get_model(check_name(request.model, param="model"))
        asked = await self._prefetches.ask(model.name, request.node, is_dry=request.dry_run)
        return pb.PrefetchModelResponse(
            revision=asked.revision,
            size_bytes=asked.size_bytes,
            asked_nodes=asked.asked_nodes,
            holding_nodes=asked.holding_nodes,
        )

    async def ListPrefetches(self, request: pb.ListPrefetchesRequest, context: Any) -> pb.ListPrefetchesResponse:
        """Lists nodes with their plans and what became of them."""
        elsewhere: pb.ListPrefetchesResponse | None = await self._agents.relay.ask(
            context, PrefetchServiceStub, lambda stub: stub.ListPrefetches, request
        )
        return elsewhere or pb.ListPrefetchesResponse(nodes=map(_node_to_proto, self._prefetches.nodes()))


def _node_to_proto(view: NodeView) -> pb.NodePrefetches:
    message = pb.NodePrefetches(
        node=view.node,
        plan=plan_to_proto(view.plan) if view.plan is not None else None,
        report=view.report,
        budget_bytes=view.budget_bytes,
    )
    if view.reported_at is not None:
        message.reported_at.FromDatetime(view.reported_at)
    return message
