"""RegistryService over the catalog and the ingester: validation, permissions, pages, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from helios.api.registry.v1 import registry_service_pb2 as pb
from helios.api.registry.v1.registry_service_pb2_grpc import RegistryServiceServicer
from helios.mesh.errors import HeliosError, InvalidRequest
from helios.registry import access, metrics, wire
from helios.registry.catalog import Catalog
from helios.registry.collection_wire import collection_report_to_proto, grace_from_proto
from helios.registry.collector import Collector
from helios.registry.events import Mutation
from helios.registry.ingest import Ingester
from helios.registry.manifest import parse_revision
from helios.registry.names import check_name
from helios.registry.pages import bad_token, make_token, page_size, read_token
from helios.registry.records import IngestPhase, IngestProgress


class RegistryServicer(RegistryServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, catalog: Catalog, ingester: Ingester, collector: Collector) -> None:
        self._catalog = catalog
        self._ingester = ingester
        self._collector = collector

    async def IngestModel(self, request: pb.IngestModelRequest, context: Any) -> AsyncIterator[pb.IngestModelResponse]:
        """Streams an ingest; a caller that goes away cancels it unless another one follows it too."""
        access.check_may_write(context)
        has_begun = False
        mutation = Mutation(access.actor_of(context), request.request_id, request.expected_version)
        async with aclosing(self._ingester.ingest(wire.ingest_spec_from_proto(request, mutation))) as events:
            try:
                async for event in events:
                    # Over REST the first message is a 200: nothing is sent before the source was looked at, so that
                    # one that can't be taken is an error of the request.
                    if event == IngestProgress(IngestPhase.INSPECT):
                        continue
                    has_begun = True
                    yield wire.ingest_event_to_proto(event)
            except HeliosError as error:
                # After the 200 Envoy ends the answer as if nothing had happened: the error goes in band as well.
                if has_begun:
                    yield wire.ingest_error_to_proto(error)
                raise

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Lists models by name."""
        del context
        size = page_size(request.page_size)
        after = read_token(request.page_token, "models")
        # One more than asked for says whether another page follows.
        found = await self._catalog.store.list_models(after=after, limit=size + 1)
        page = found[:size]
        token = make_token("models", page[-1].name) if len(found) > size else ""
        return pb.ListModelsResponse(models=map(wire.model_to_proto, page), next_page_token=token)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """Finds a model by name or alias."""
        del context
        model = await self._catalog.store.get_model(_required(request.name, "name"))
        return pb.GetModelResponse(model=wire.model_to_proto(model))

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> pb.DeleteModelResponse:
        """Removes a model."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        name = _required(request.name, "name")
        freed = await self._catalog.delete_model(name, mutation, is_forced=request.force)
        return pb.DeleteModelResponse(freed_bytes=freed)

    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: Any) -> pb.ListRevisionsResponse:
        """Lists a model's revisions, newest first."""
        del context
        size = page_size(request.page_size)
        token = read_token(request.page_token, "revisions")
        # 18 digits: an integer of SQL holds them.
        if token and not (token.isascii() and token.isdecimal() and len(token) <= 18):
            raise bad_token()
        name = _required(request.name, "name")
        found = await self._catalog.store.list_revisions(name, before=int(token) if token else None, limit=size + 1)
        page = found[:size]
        next_token = make_token("revisions", str(page[-1][0])) if len(found) > size else ""
        return pb.ListRevisionsResponse(
            revisions=[wire.revision_to_proto(revision) for _, revision in page], next_page_token=next_token
        )

    async def GetManifest(self, request: pb.GetManifestRequest, context: Any) -> pb.GetManifestResponse:
        """Returns a revision's manifest."""
        del context
        return wire.located_manifest_to_proto(await self._catalog.locate(parse_revision(request.revision)))

    async def PutAlias(self, request: pb.PutAliasRequest, context: Any) -> pb.PutAliasResponse:
        """Points an alias at a model."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        alias, name = check_name(request.alias, param="alias"), _required(request.model, "model")
        model = await self._catalog.put_alias(alias, name, mutation)
        return pb.PutAliasResponse(model=wire.model_to_proto(model))

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Any) -> pb.DeleteAliasResponse:
        """Removes an alias."""
        access.check_may_write(context)
        mutation = access.mutation_of(context, request)
        await self._catalog.delete_alias(_required(request.alias, "alias"), mutation)
        return pb.DeleteAliasResponse()

    async def UpdatePolicy(self, request: pb.UpdatePolicyRequest, context: Any) -> pb.UpdatePolicyResponse:
        """Sets a model's policy, or says what that would make of it."""
        access.check_may_set_policy(context)
        if not request.HasField("policy"):
            raise InvalidRequest("policy is missing", reason="INVALID_POLICY", metadata={"param": "policy"})
        name = _required(request.name, "name")
        mutation = access.mutation_of(context, request)
        model = await self._catalog.update_policy(name, wire.policy_from_proto(request.policy), mutation)
        return pb.UpdatePolicyResponse(model=wire.model_to_proto(model))

    async def UpdateEngineSettings(
        self, request: pb.UpdateEngineSettingsRequest, context: Any
    ) -> pb.UpdateEngineSettingsResponse:
        """Replaces a model's engine settings."""
        access.check_may_write(context)
        name = _required(request.name, "name")
        settings = wire.engine_settings_from_proto(request.settings)
        mutation = access.mutation_of(context, request)
        model = await self._catalog.update_engine_settings(name, settings, mutation)
        return pb.UpdateEngineSettingsResponse(model=wire.model_to_proto(model))

    async def CollectBlobs(self, request: pb.CollectBlobsRequest, context: Any) -> pb.CollectBlobsResponse:
        """Removes blobs that nothing refers to."""
        access.check_may_write(context)
        report = await self._collector.collect(is_dry_run=request.dry_run, grace=grace_from_proto(request))
        return collection_report_to_proto(report)

    async def WatchModels(self, request: pb.WatchModelsRequest, context: Any) -> AsyncIterator[pb.WatchModelsResponse]:
        """Streams all models, or what changed since a version, then changes."""
        del context
        after = request.after_version if request.HasField("after_version") else None
        with metrics.WATCHERS.track_inprogress():
            async with aclosing(self._catalog.watch(after)) as events:
                async for event in events:
                    yield wire.watch_event_to_proto(event)


def _required(value: str, param: str) -> str:
    if not value:
        raise InvalidRequest(f"{param} is missing", metadata={"param": param})
    return value
