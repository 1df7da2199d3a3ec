"""The registry as other components see it: typed calls, values in and out, HeliosError on failure.

Every unary call has a timeout and is idempotent, ``delete_model`` and ``delete_alias`` apart (the second one is
NOT_FOUND). ``watch_models`` is one stream: when it fails, call it again (``helios.mesh.tasks.keep_running`` does) and
begin with the new snapshot.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Final

from helios.api.registry.v1 import registry_service_pb2 as pb
from helios.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from helios.mesh.calls import RESTART_SECONDS, answer_of, messages_of
from helios.mesh.channel import StubSource
from helios.registry import wire
from helios.registry.artifact_client import ArtifactClient
from helios.registry.artifacts import Artifact
from helios.registry.collection import CollectionReport
from helios.registry.collection_wire import collection_report_from_proto, collection_to_proto
from helios.registry.cordons.client import Cordon, CordonClient
from helios.registry.engine_settings import EngineSettings
from helios.registry.events import Event, EventKind, EventsMissed
from helios.registry.follow.client import FollowClient
from helios.registry.follow.following import Following, Wish
from helios.registry.follow.following import Policy as FollowPolicy
from helios.registry.history import Cause, Move
from helios.registry.keys.client import ApiKey, KeyClient, KeySpec, Priority, StoredKey, hash_secret
from helios.registry.leases.client import Grant, LeaseClient, ToldLease
from helios.registry.leases.client import Wish as LeaseWish
from helios.registry.manifest import Digest, Entry, Manifest
from helios.registry.policy import ModelPolicy
from helios.registry.profile import ModelProfile
from helios.registry.profiles.client import ProfileClient
from helios.registry.profiles.measure import Measure
from helios.registry.push.client import PushClient
from helios.registry.push.records import PushDone, PushEvent
from helios.registry.records import (
    BlobLocation,
    IngestDone,
    IngestEvent,
    IngestPhase,
    IngestProgress,
    IngestSpec,
    LocatedManifest,
    Model,
    ModelChange,
    ModelDeleted,
    ModelSnapshot,
    ModelUpserted,
    Pin,
    PushPhase,
    ResolvedModel,
    Revision,
    Rollout,
    Tag,
    WatchEvent,
)
from helios.registry.rollout.client import RolloutClient
from helios.registry.rollout.steps import RolloutStep
from helios.registry.sync.client import StorageAgent, SyncClient
from helios.registry.usage.client import (
    BlobHeat,
    Counts,
    Delta,
    Expectation,
    Forecast,
    ModelUsage,
    Rung,
    Score,
    Target,
    UsageClient,
    UsageHour,
    hour_of,
    start_of,
)
from helios.registry.usage.prefetch_client import NodePrefetches, PrefetchAsked, PrefetchClient, PrefetchOrder
from helios.registry.version_client import VersionClient

__all__ = [
    "ApiKey",
    "Artifact",
    "ArtifactClient",
    "BlobHeat",
    "BlobLocation",
    "Cause",
    "CollectionReport",
    "Cordon",
    "CordonClient",
    "Counts",
    "Delta",
    "Digest",
    "EngineSettings",
    "Entry",
    "Event",
    "EventKind",
    "EventsMissed",
    "Expectation",
    "FollowClient",
    "FollowPolicy",
    "Following",
    "Forecast",
    "Grant",
    "IngestDone",
    "IngestEvent",
    "IngestPhase",
    "IngestProgress",
    "IngestSpec",
    "KeyClient",
    "KeySpec",
    "LeaseClient",
    "LeaseWish",
    "LocatedManifest",
    "Manifest",
    "Measure",
    "Model",
    "ModelChange",
    "ModelDeleted",
    "ModelPolicy",
    "ModelProfile",
    "ModelSnapshot",
    "ModelUpserted",
    "ModelUsage",
    "Move",
    "NodePrefetches",
    "Pin",
    "PrefetchAsked",
    "PrefetchClient",
    "PrefetchOrder",
    "Priority",
    "ProfileClient",
    "PushClient",
    "PushDone",
    "PushEvent",
    "PushPhase",
    "RegistryClient",
    "ResolvedModel",
    "Revision",
    "Rollout",
    "RolloutClient",
    "RolloutStep",
    "Rung",
    "Score",
    "StorageAgent",
    "StoredKey",
    "SyncClient",
    "Tag",
    "Target",
    "ToldLease",
    "UsageClient",
    "UsageHour",
    "VersionClient",
    "WatchEvent",
    "Wish",
    "hash_secret",
    "hour_of",
    "start_of",
]

# Reads take milliseconds; a registry that was just started may still open its database.
DEFAULT_TIMEOUT_SECONDS: Final = 10.0
# Deleting may wait for an ingest's commit and removes files of a whole model.
DELETE_TIMEOUT_SECONDS: Final = 60.0
# A large model off a slow disk; the registry's own limits end an ingest that hangs.
INGEST_TIMEOUT_SECONDS: Final = 4 * 3600.0
# A million objects are listed in a thousand requests.
COLLECT_TIMEOUT_SECONDS: Final = 600.0
PAGE_SIZE: Final = 1_000


class RegistryClient:
    """Calls on one registry. The dialer stays the caller's, who opens and closes it."""

    def __init__(self, dialer: StubSource, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self._dialer = dialer
        self._timeout_seconds = timeout_seconds

    async def get_model(self, name: str) -> Model:
        """Returns a model by name or alias. Raises ModelNotFound."""
        request = pb.GetModelRequest(name=name)
        response = await answer_of(self._stub().GetModel(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def list_models(self) -> tuple[Model, ...]:
        """Returns all models by name; pages are fetched as needed."""
        found: list[Model] = []
        token = ""
        while True:
            request = pb.ListModelsRequest(page_size=PAGE_SIZE, page_token=token)
            response = await answer_of(self._stub().ListModels(request, timeout=self._timeout_seconds))
            found += map(wire.model_from_proto, response.models)
            token = response.next_page_token
            if not token:
                return tuple(found)

    async def list_revisions(self, name: str) -> tuple[Revision, ...]:
        """Returns a model's revisions, newest first. Raises ModelNotFound."""
        found: list[Revision] = []
        token = ""
        while True:
            request = pb.ListRevisionsRequest(name=name, page_size=PAGE_SIZE, page_token=token)
            response = await answer_of(self._stub().ListRevisions(request, timeout=self._timeout_seconds))
            found += map(wire.revision_from_proto, response.revisions)
            token = response.next_page_token
            if not token:
                return tuple(found)

    async def get_manifest(self, revision: str) -> LocatedManifest:
        """Returns a revision's manifest and where its blobs are; the manifest's paths are checked.

        Raises:
            RevisionNotFound: No such revision.
            Corrupted: A blob is missing from the store.
        """
        request = pb.GetManifestRequest(revision=revision)
        response = await answer_of(self._stub().GetManifest(request, timeout=self._timeout_seconds))
        return wire.located_manifest_from_proto(response)

    async def update_policy(
        self, name: str, policy: ModelPolicy, *, expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Replaces a model's policy, or returns the model as that would leave it.

        Raises:
            ModelNotFound: No such model.
            InvalidRequest: INVALID_POLICY.
            Conflict: STALE_VERSION, the model does not have the expected version, if one is given, any more.
        """
        policy_message = wire.policy_to_proto(policy)
        request = pb.UpdatePolicyRequest(
            name=name, policy=policy_message, expected_version=expected_version, dry_run=is_dry_run
        )
        # Idempotent, and an operator waits for it: a registry that restarts is waited for.
        stub = self._stub()
        response = await answer_of(stub.UpdatePolicy(request, timeout=RESTART_SECONDS, wait_for_ready=True))
        return wire.model_from_proto(response.model)

    async def update_engine_settings(
        self, name: str, settings: EngineSettings, *, expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Replaces a model's engine settings.

        Raises:
            ModelNotFound: No such model.
            InvalidRequest: INVALID_ENGINE_SETTINGS.
            Conflict: STALE_VERSION, the model does not have the expected version, if one is given, any more.
        """
        request = pb.UpdateEngineSettingsRequest(
            name=name,
            settings=wire.engine_settings_to_proto(settings),
            expected_version=expected_version,
            dry_run=is_dry_run,
        )
        response = await answer_of(self._stub().UpdateEngineSettings(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def put_alias(
        self, alias: str, model: str, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Points an alias at a model. Raises ModelNotFound, AlreadyExists, InvalidRequest, Conflict (STALE_VERSION)."""
        request = pb.PutAliasRequest(
            alias=alias, model=model, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().PutAlias(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def delete_alias(
        self, alias: str, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> None:
        """Removes an alias. Raises NotFound (ALIAS_NOT_FOUND), Conflict (STALE_VERSION)."""
        request = pb.DeleteAliasRequest(
            alias=alias, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        await answer_of(self._stub().DeleteAlias(request, timeout=self._timeout_seconds))

    async def delete_model(
        self,
        name: str,
        *,
        is_forced: bool = False,
        request_id: str = "",
        expected_version: int = 0,
        is_dry_run: bool = False,
    ) -> int:
        """Removes a model; returns the bytes of blobs that were freed.

        Raises:
            ModelNotFound: No model has this name.
            PreconditionFailed: MODEL_IN_USE, unless forced.
            Conflict: STALE_VERSION.
        """
        request = pb.DeleteModelRequest(
            name=name, force=is_forced, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().DeleteModel(request, timeout=DELETE_TIMEOUT_SECONDS))
        return response.freed_bytes

    async def collect_blobs(self, *, is_dry_run: bool = False, grace: timedelta | None = None) -> CollectionReport:
        """Removes blobs that nothing refers to, or says which would go; None: the registry's own grace period.

        Raises:
            Conflict: COLLECTION_RUNNING.
            Unavailable: BLOB_STORE_UNAVAILABLE, BLOB_STORE_DENIED.
        """
        request = collection_to_proto(is_dry_run=is_dry_run, grace=grace)
        response = await answer_of(self._stub().CollectBlobs(request, timeout=COLLECT_TIMEOUT_SECONDS))
        return collection_report_from_proto(response)

    async def ingest(
        self,
        name: str,
        source: str,
        *,
        aliases: Sequence[str] = (),
        expected_sha256: str = "",
        engine_settings: EngineSettings | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        timeout_seconds: float = INGEST_TIMEOUT_SECONDS,
    ) -> AsyncGenerator[IngestEvent, None]:
        """Ingests a model; yields progress, and IngestDone last. Leaving the iteration early cancels the ingest.

        Raises:
            HeliosError: As IngestModel in the contract.
        """
        spec = IngestSpec(
            name, source, tuple(aliases), expected_sha256, engine_settings, tuple(include), tuple(exclude)
        )
        async with aclosing(self.ingest_spec(spec, timeout_seconds=timeout_seconds)) as events:
            async for event in events:
                yield event

    async def ingest_spec(
        self, spec: IngestSpec, *, timeout_seconds: float = INGEST_TIMEOUT_SECONDS
    ) -> AsyncGenerator[IngestEvent, None]:
        """Ingests as ``ingest`` does."""
        call = self._stub().IngestModel(wire.ingest_spec_to_proto(spec), timeout=timeout_seconds)
        async with aclosing(messages_of(call)) as messages:
            async for message in messages:
                event = wire.ingest_event_from_proto(message)
                if event is not None:
                    yield event

    async def watch_models(self, after_version: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        """Yields all models, then every change; with the ``version`` of the last event that a caller got, what changed
        since, unless that is not known any more. Ends only by an error; call it again then.

        Raises:
            Unavailable: The registry stopped, is gone, or this watcher was too slow.
        """
        # No timeout: the stream lasts as long as both sides live; keepalive notices a peer that is gone.
        call = self._stub().WatchModels(pb.WatchModelsRequest(after_version=after_version))
        async with aclosing(messages_of(call)) as messages:
            async for message in messages:
                event = wire.watch_event_from_proto(message)
                if event is not None:
                    yield event

    def _stub(self) -> RegistryServiceStub:
        return self._dialer.stub(RegistryServiceStub)
