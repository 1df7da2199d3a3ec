"""VersionService over the versions and the store: validation, permissions, pages, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from helios.api.registry.v1 import version_service_pb2 as pb
from helios.api.registry.v1.version_service_pb2_grpc import VersionServiceServicer
from helios.mesh.errors import InvalidRequest
from helios.registry import access, version_wire, wire
from helios.registry.events import EventsMissed
from helios.registry.names import Reference, check_name, check_tag, parse_digest, parse_reference
from helios.registry.pages import make_token, page_size, read_number
from helios.registry.store import Store
from helios.registry.versions import Versions


class VersionServicer(VersionServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, versions: Versions, store: Store) -> None:
        self._versions = versions
        self._store = store

    async def ResolveModel(self, request: pb.ResolveModelRequest, context: Any) -> pb.ResolveModelResponse:
        """Finds the revision that a reference means."""
        del context
        return version_wire.resolved_to_proto(await self._store.resolve(parse_reference(request.model)))

    async def PutTag(self, request: pb.PutTagRequest, context: Any) -> pb.PutTagResponse:
        """Points a tag, or the served revision, at a revision."""
        access.check_may_write(context)
        tag = check_tag(request.tag) if request.tag else ""
        mutation = access.mutation_of(context, request)
        model = await self._versions.put_tag(parse_reference(request.model), tag, mutation)
        return pb.PutTagResponse(model=wire.model_to_proto(model))

    async def DeleteTag(self, request: pb.DeleteTagRequest, context: Any) -> pb.DeleteTagResponse:
        """Removes a tag."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        model = await self._versions.delete_tag(
            check_name(request.model, param="model"), check_tag(request.tag), mutation
        )
        return pb.DeleteTagResponse(model=wire.model_to_proto(model))

    async def RollBackModel(self, request: pb.RollBackModelRequest, context: Any) -> pb.RollBackModelResponse:
        """Points a tag, or the served revision, where it pointed before."""
        access.check_may_write(context)
        tag = check_tag(request.tag) if request.tag else ""
        mutation = access.mutation_of(context, request)
        name = check_name(request.model, param="model")
        to = Reference(name, digest=parse_digest(request.revision)) if request.revision else None
        model = await self._versions.roll_back(name, tag, mutation, to=to)
        return pb.RollBackModelResponse(model=wire.model_to_proto(model))

    async def ListMoves(self, request: pb.ListMovesRequest, context: Any) -> pb.ListMovesResponse:
        """Lists where a model's pointers have been, the newest move first."""
        del context
        size = page_size(request.page_size)
        before = read_number(request.page_token, "moves")
        tag = request.tag if request.HasField("tag") else None
        if tag:
            check_tag(tag)
        name = check_name(request.model, param="model")
        found = await self._versions.store.list_moves(name, tag=tag, before=before, limit=size + 1)
        page = found[:size]
        next_token = make_token("moves", str(page[-1].version)) if len(found) > size else ""
        return pb.ListMovesResponse(moves=map(version_wire.move_to_proto, page), next_page_token=next_token)

    async def PutPin(self, request: pb.PutPinRequest, context: Any) -> pb.PutPinResponse:
        """Keeps a revision from being deleted."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        model = await self._versions.put_pin(parse_reference(request.model), request.reason, mutation)
        return pb.PutPinResponse(model=wire.model_to_proto(model))

    async def DeletePin(self, request: pb.DeletePinRequest, context: Any) -> pb.DeletePinResponse:
        """Takes a pin back."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        model = await self._versions.delete_pin(parse_reference(request.model), mutation)
        return pb.DeletePinResponse(model=wire.model_to_proto(model))

    async def DeleteRevision(self, request: pb.DeleteRevisionRequest, context: Any) -> pb.DeleteRevisionResponse:
        """Removes a revision that nothing points at."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        target = parse_reference(request.model)
        if not target.digest:
            # A pointer may move between the look and the deletion; a digest means one revision for ever.
            raise InvalidRequest(
                "name the revision by its digest: MODEL@sha256:…",
                reason="INVALID_DIGEST",
                metadata={"param": "model"},
            )
        model, freed_bytes = await self._versions.delete_revision(target, mutation)
        return pb.DeleteRevisionResponse(model=wire.model_to_proto(model), freed_bytes=freed_bytes)

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.WatchEventsResponse]:
        """Streams changes."""
        del context
        after = request.after_version if request.HasField("after_version") else None
        async with aclosing(self._versions.watch_events(after)) as events:
            async for event in events:
                if isinstance(event, EventsMissed):
                    yield pb.WatchEventsResponse(resync=pb.Resync(version=event.version))
                else:
                    yield pb.WatchEventsResponse(event=version_wire.event_to_proto(event))
