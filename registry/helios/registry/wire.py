"""The registry's messages as values and back: two plain functions a type, for servicer and client alike."""

import json
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from helios.api.engine.v1 import engine_settings_pb2 as engine_pb
from helios.api.registry.v1 import registry_service_pb2 as pb
from helios.mesh.errors import HeliosError, InvalidRequest
from helios.mesh.routing import USUAL_ROUTING, Choice, ModelRouting
from helios.mesh.status import openai_body
from helios.mesh.windows import Window
from helios.registry.engine_settings import EngineSettings
from helios.registry.events import Mutation
from helios.registry.manifest import Digest, Entry, Manifest
from helios.registry.policy import ModelPolicy
from helios.registry.profile import ModelProfile
from helios.registry.records import (
    BlobLocation,
    IngestDone,
    IngestEvent,
    IngestPhase,
    IngestProgress,
    IngestSpec,
    LocatedManifest,
    Model,
    ModelDeleted,
    ModelSnapshot,
    ModelUpserted,
    Pin,
    PushPhase,
    Revision,
    Rollout,
    Tag,
    WatchEvent,
)

# By their names; "commit" is both's, and reads as an ingest's, which equals it.
_PHASES: Final[dict[str, IngestPhase | PushPhase]] = {phase.value: phase for phase in (*PushPhase, *IngestPhase)}
_CHOICES: Final = {
    Choice.BEST: pb.REPLICA_CHOICE_BEST,
    Choice.POWER_OF_TWO: pb.REPLICA_CHOICE_POWER_OF_TWO,
}


def timestamp_to_proto(moment: datetime) -> Timestamp:
    """Returns a moment on the wire."""
    result = Timestamp()
    result.FromDatetime(moment)
    return result


def profile_to_proto(profile: ModelProfile) -> pb.ModelProfile:
    """Returns a profile on the wire."""
    return pb.ModelProfile(
        architecture=profile.architecture,
        parameter_count=profile.parameter_count,
        weights_bytes=profile.weights_bytes,
        dtype=profile.dtype,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        max_context_tokens=profile.max_context_tokens,
        layer_count=profile.layer_count,
        vocabulary_size=profile.vocabulary_size,
        base_model=profile.base_model,
        license=profile.license,
        tensor_parallel_options=profile.tensor_parallel_options,
        pipeline_parallel_options=profile.pipeline_parallel_options,
    )


def profile_from_proto(message: pb.ModelProfile) -> ModelProfile:
    """Reads a profile."""
    return ModelProfile(
        architecture=message.architecture,
        parameter_count=message.parameter_count,
        weights_bytes=message.weights_bytes,
        dtype=message.dtype,
        kv_bytes_per_token=message.kv_bytes_per_token,
        max_context_tokens=message.max_context_tokens,
        layer_count=message.layer_count,
        vocabulary_size=message.vocabulary_size,
        base_model=message.base_model,
        license=message.license,
        tensor_parallel_options=tuple(message.tensor_parallel_options),
        pipeline_parallel_options=tuple(message.pipeline_parallel_options),
    )


def revision_to_proto(revision: Revision) -> pb.Revision:
    """Returns a revision on the wire."""
    return pb.Revision(
        digest=revision.digest,
        profile=profile_to_proto(revision.profile),
        source=revision.source,
        size_bytes=revision.size_bytes,
        created_at=timestamp_to_proto(revision.created_at),
    )


def revision_from_proto(message: pb.Revision) -> Revision:
    """Reads a revision."""
    return Revision(
        digest=message.digest,
        profile=profile_from_proto(message.profile),
        source=message.source,
        size_bytes=message.size_bytes,
        created_at=message.created_at.ToDatetime(UTC),
    )


def policy_to_proto(policy: ModelPolicy) -> pb.ModelPolicy:
    """Returns a policy on the wire."""
    message = pb.ModelPolicy(
        min_replicas=policy.min_replicas, max_replicas=policy.max_replicas, is_durable=policy.is_durable
    )
    for window in policy.windows:
        told = message.windows.add(
            begins=window.begins,
            time_zone=window.time_zone,
            min_replicas=window.min_replicas,
            max_replicas=window.max_replicas,
        )
        told.duration.FromMilliseconds(round(window.seconds * 1000))
    for seconds, time in (
        (policy.idle_seconds, message.idle_time),
        (policy.asleep_seconds, message.asleep_time),
        (policy.staged_seconds, message.staged_time),
    ):
        if seconds is not None:
            # Of no time at all, nothing would be set.
            time.SetInParent()
            time.FromMilliseconds(round(seconds * 1000))
    if policy.routing != USUAL_ROUTING:
        message.routing.CopyFrom(_routing_to_proto(policy.routing))
    return message


def policy_from_proto(message: pb.ModelPolicy) -> ModelPolicy:
    """Reads a policy; ``ModelPolicy.check`` judges it."""
    windows = tuple(
        Window(
            begins=told.begins,
            seconds=told.duration.ToMilliseconds() / 1000,
            time_zone=told.time_zone,
            min_replicas=told.min_replicas if told.HasField("min_replicas") else None,
            max_replicas=told.max_replicas if told.HasField("max_replicas") else None,
        )
        for told in message.windows
    )
    return ModelPolicy(
        min_replicas=message.min_replicas,
        max_replicas=message.max_replicas,
        windows=windows,
        idle_seconds=message.idle_time.ToMilliseconds() / 1000 if message.HasField("idle_time") else None,
        asleep_seconds=message.asleep_time.ToMilliseconds() / 1000 if message.HasField("asleep_time") else None,
        staged_seconds=message.staged_time.ToMilliseconds() / 1000 if message.HasField("staged_time") else None,
        is_durable=message.is_durable,
        routing=_routing_from_proto(message.routing) if message.HasField("routing") else USUAL_ROUTING,
    )


def _routing_to_proto(routing: ModelRouting) -> pb.ModelRouting:
    values = routing.as_fields()
    if routing.choice is not None:
        values["choice"] = _CHOICES[routing.choice]
    return pb.ModelRouting(**values)


def _routing_from_proto(message: pb.ModelRouting) -> ModelRouting:
    """Reads what a policy says of routing; a choice that this software does not know is as proxies are set."""
    values: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    values["choice"] = next((choice for choice, value in _CHOICES.items() if value == message.choice), None)
    return ModelRouting.of_fields(values)


def engine_settings_to_proto(settings: EngineSettings) -> engine_pb.EngineSettings:
    """Returns engine settings on the wire; what a newer registry kept and this one does not know is left out."""
    return json_format.Parse(settings.document, engine_pb.EngineSettings(), ignore_unknown_fields=True)


def engine_settings_from_proto(message: engine_pb.EngineSettings) -> EngineSettings:
    """Reads engine settings; ``EngineSettings.check`` judges them."""
    document = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return EngineSettings(json.dumps(document, sort_keys=True))


def model_to_proto(model: Model) -> pb.Model:
    """Returns a model on the wire."""
    return pb.Model(
        name=model.name,
        aliases=model.aliases,
        revision=revision_to_proto(model.revision),
        policy=policy_to_proto(model.policy),
        created_at=timestamp_to_proto(model.created_at),
        engine_settings=engine_settings_to_proto(model.engine_settings),
        tags=[
            pb.Tag(name=tag.name, revision=revision_to_proto(tag.revision), moved_at=timestamp_to_proto(tag.moved_at))
            for tag in model.tags
        ],
        pins=[
            pb.Pin(revision=pin.revision, reason=pin.reason, created_at=timestamp_to_proto(pin.created_at))
            for pin in model.pins
        ],
        version=model.version,
        rollout=_rollout_to_proto(model.rollout) if model.rollout is not None else None,
    )


def model_from_proto(message: pb.Model) -> Model:
    """Reads a model."""
    return Model(
        name=message.name,
        aliases=tuple(message.aliases),
        revision=revision_from_proto(message.revision),
        policy=policy_from_proto(message.policy),
        created_at=message.created_at.ToDatetime(UTC),
        engine_settings=engine_settings_from_proto(message.engine_settings),
        tags=tuple(
            Tag(tag.name, revision_from_proto(tag.revision), tag.moved_at.ToDatetime(UTC)) for tag in message.tags
        ),
        pins=tuple(Pin(pin.revision, pin.reason, pin.created_at.ToDatetime(UTC)) for pin in message.pins),
        version=message.version,
        rollout=_rollout_from_proto(message.rollout) if message.HasField("rollout") else None,
    )


def manifest_to_proto(manifest: Manifest) -> pb.Manifest:
    """Returns a manifest on the wire."""
    return pb.Manifest(
        entries=[
            pb.ManifestEntry(
                path=entry.path,
                digest=pb.Digest(algorithm="sha256", hash=entry.digest.hash, size_bytes=entry.digest.size_bytes),
                media_type=entry.media_type,
            )
            for entry in manifest.entries
        ]
    )


def manifest_from_proto(message: pb.Manifest) -> Manifest:
    """Reads a manifest and checks it: its paths become file names here.

    Raises:
        InvalidRequest: INVALID_MANIFEST.
    """
    for entry in message.entries:
        if entry.digest.algorithm != "sha256":
            raise InvalidRequest(
                f"unknown hash function {entry.digest.algorithm[:50]!r}; 'sha256' is known", reason="INVALID_MANIFEST"
            )
    return Manifest.of(
        Entry(entry.path, Digest(entry.digest.hash, entry.digest.size_bytes), entry.media_type)
        for entry in message.entries
    )


def located_manifest_to_proto(located: LocatedManifest) -> pb.GetManifestResponse:
    """Returns a manifest and where its blobs are on the wire."""
    return pb.GetManifestResponse(
        manifest=manifest_to_proto(located.manifest),
        blob_store_url=located.blob_store_url,
        revision=revision_to_proto(located.revision) if located.revision is not None else None,
        locations=[pb.BlobLocation(url=each.url, options=dict(each.options)) for each in located.locations],
    )


def located_manifest_from_proto(message: pb.GetManifestResponse) -> LocatedManifest:
    """Reads a manifest and where its blobs are. Raises InvalidRequest (INVALID_MANIFEST)."""
    revision = revision_from_proto(message.revision) if message.HasField("revision") else None
    # A registry of an earlier version says the URL alone.
    locations = tuple(BlobLocation(each.url, dict(each.options)) for each in message.locations)
    locations = locations or (BlobLocation(message.blob_store_url),)
    return LocatedManifest(manifest_from_proto(message.manifest), locations, revision)


def ingest_spec_to_proto(spec: IngestSpec) -> pb.IngestModelRequest:
    """Returns what to ingest on the wire."""
    settings = spec.engine_settings
    return pb.IngestModelRequest(
        name=spec.name,
        source=spec.source,
        aliases=spec.aliases,
        expected_sha256=spec.expected_sha256,
        engine_settings=engine_settings_to_proto(settings) if settings is not None else None,
        include=spec.include,
        exclude=spec.exclude,
        tags=spec.tags,
        keep_served=spec.keep_served,
        request_id=spec.mutation.request_id,
        expected_version=spec.mutation.expected_version,
    )


def ingest_spec_from_proto(message: pb.IngestModelRequest, mutation: Mutation) -> IngestSpec:
    """Reads what to ingest; the ingester judges it. ``mutation`` is what the call says of itself."""
    settings = engine_settings_from_proto(message.engine_settings) if message.HasField("engine_settings") else None
    return IngestSpec(
        message.name,
        message.source,
        tuple(message.aliases),
        message.expected_sha256,
        settings,
        tuple(message.include),
        tuple(message.exclude),
        tuple(message.tags),
        message.keep_served,
        mutation,
    )


def ingest_event_to_proto(event: IngestEvent) -> pb.IngestModelResponse:
    """Returns progress or result on the wire."""
    if isinstance(event, IngestDone):
        done = pb.IngestDone(model=model_to_proto(event.model), new_bytes=event.new_bytes)
        return pb.IngestModelResponse(done=done)
    return pb.IngestModelResponse(progress=progress_to_proto(event))


def progress_to_proto(event: IngestProgress) -> pb.IngestProgress:
    """Returns progress of an ingest or a push on the wire."""
    progress = pb.IngestProgress(
        phase=event.phase.value,
        done_bytes=max(0, event.done_bytes),
        total_bytes=event.total_bytes,
        bytes_per_second=event.bytes_per_second,
    )
    if event.remaining_seconds is not None:
        progress.remaining.FromNanoseconds(round(event.remaining_seconds * 1e9))
    return progress


def ingest_error_to_proto(error: HeliosError) -> pb.IngestModelResponse:
    """Returns what REST callers read of an ingest that failed in mid-stream: OpenAI's error, as everywhere else."""
    body = json.loads(openai_body(error))["error"]
    return pb.IngestModelResponse(error=pb.IngestError(**body))


def ingest_event_from_proto(message: pb.IngestModelResponse) -> IngestEvent | None:
    """Reads progress or result; None for what this client needs no event for: an error is the call's status, too."""
    if message.HasField("done"):
        return IngestDone(model_from_proto(message.done.model), message.done.new_bytes)
    return progress_from_proto(message.progress) if message.HasField("progress") else None


def progress_from_proto(message: pb.IngestProgress) -> IngestProgress | None:
    """Reads progress; None for a phase that only a newer registry knows."""
    if (phase := _PHASES.get(message.phase)) is None:
        return None
    remaining = message.remaining.ToNanoseconds() / 1e9 if message.HasField("remaining") else None
    return IngestProgress(phase, message.done_bytes, message.total_bytes, message.bytes_per_second, remaining)


def watch_event_to_proto(event: WatchEvent) -> pb.WatchModelsResponse:
    """Returns a snapshot or change on the wire."""
    if isinstance(event, ModelSnapshot):
        models = [model_to_proto(model) for model in event.models]
        return pb.WatchModelsResponse(snapshot=pb.ModelSnapshot(models=models), version=event.version)
    if isinstance(event, ModelUpserted):
        return pb.WatchModelsResponse(upserted=model_to_proto(event.model), version=event.version)
    return pb.WatchModelsResponse(deleted=event.name, version=event.version)


def watch_event_from_proto(message: pb.WatchModelsResponse) -> WatchEvent | None:
    """Reads a snapshot or change; None for an event of a newer registry, which a watcher passes over."""
    match message.WhichOneof("event"):
        case "snapshot":
            return ModelSnapshot(tuple(map(model_from_proto, message.snapshot.models)), message.version)
        case "upserted":
            return ModelUpserted(model_from_proto(message.upserted), message.version)
        case "deleted":
            return ModelDeleted(message.deleted, message.version)
        case _:
            return None


def _rollout_to_proto(rollout: Rollout) -> pb.Rollout:
    return pb.Rollout(
        revision=revision_to_proto(rollout.revision),
        weight_percent=rollout.weight_percent,
        started_at=timestamp_to_proto(rollout.started_at),
    )


def _rollout_from_proto(message: pb.Rollout) -> Rollout:
    return Rollout(
        revision=revision_from_proto(message.revision),
        weight_percent=message.weight_percent,
        started_at=message.started_at.ToDatetime(UTC),
    )
