"""RolloutService over the store and the catalog, whose writes and watchers are a rollout's too."""

from datetime import UTC, datetime
from typing import Any

from helios.api.registry.v1 import rollout_service_pb2 as pb
from helios.api.registry.v1.rollout_service_pb2_grpc import RolloutServiceServicer
from helios.registry import access, wire
from helios.registry.catalog import Catalog
from helios.registry.names import check_name, parse_reference
from helios.registry.pages import make_token, page_size, read_number
from helios.registry.rollout.store import RolloutStore
from helios.registry.rollout.wire import step_to_proto


class RolloutServicer(RolloutServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, catalog: Catalog, store: RolloutStore) -> None:
        self._catalog = catalog
        self._store = store

    async def PutRollout(self, request: pb.PutRolloutRequest, context: Any) -> pb.PutRolloutResponse:
        """Sends a share of a model's requests to a revision."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        target = parse_reference(request.model)
        model = await self._catalog.write(
            lambda: self._store.put(target, request.weight_percent, datetime.now(UTC), mutation)
        )
        return pb.PutRolloutResponse(model=wire.model_to_proto(model))

    async def PromoteRollout(self, request: pb.PromoteRolloutRequest, context: Any) -> pb.PromoteRolloutResponse:
        """Serves the canary."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        name = check_name(request.model, param="model")
        model = await self._catalog.write(lambda: self._store.promote(name, datetime.now(UTC), mutation))
        return pb.PromoteRolloutResponse(model=wire.model_to_proto(model))

    async def AbortRollout(self, request: pb.AbortRolloutRequest, context: Any) -> pb.AbortRolloutResponse:
        """Gives the canary up."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        name = check_name(request.model, param="model")
        model = await self._catalog.write(lambda: self._store.abort(name, datetime.now(UTC), mutation))
        return pb.AbortRolloutResponse(model=wire.model_to_proto(model))

    async def ListRolloutSteps(self, request: pb.ListRolloutStepsRequest, context: Any) -> pb.ListRolloutStepsResponse:
        """Lists what was done to a model's rollouts, the newest step first."""
        del context
        size = page_size(request.page_size)
        before = read_number(request.page_token, "rollout-steps")
        found = await self._store.list_steps(check_name(request.model, param="model"), before=before, limit=size + 1)
        page = found[:size]
        token = make_token("rollout-steps", str(page[-1].version)) if len(found) > size else ""
        return pb.ListRolloutStepsResponse(steps=map(step_to_proto, page), next_page_token=token)
