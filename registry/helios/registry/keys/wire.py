"""Keys as messages and back."""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from helios.api.registry.v1 import key_service_pb2 as pb
from helios.mesh.errors import InvalidRequest
from helios.registry.keys.records import ApiKey, KeySpec, Priority, StoredKey


def spec_from_proto(message: pb.CreateKeyRequest) -> KeySpec:
    """Reads what a key is to be. Raises InvalidRequest (INVALID_KEY) for a priority that there is not."""
    return KeySpec(
        name=message.name,
        tenant=message.tenant,
        models=tuple(message.models),
        requests_per_minute=message.limits.requests_per_minute,
        tokens_per_minute=message.limits.tokens_per_minute,
        priority=_priority(message.priority),
        weight=message.weight,
        ttl=message.ttl.ToTimedelta() if message.HasField("ttl") else None,
    )


def spec_to_proto(spec: KeySpec) -> pb.CreateKeyRequest:
    """Writes what a key is to be."""
    message = pb.CreateKeyRequest(
        name=spec.name,
        tenant=spec.tenant,
        models=spec.models,
        limits=pb.KeyLimits(requests_per_minute=spec.requests_per_minute, tokens_per_minute=spec.tokens_per_minute),
        priority=pb.KeyPriority.ValueType(int(spec.priority)),
        weight=spec.weight,
    )
    if spec.ttl is not None:
        message.ttl.FromTimedelta(spec.ttl)
    return message


def key_to_proto(key: ApiKey) -> pb.ApiKey:
    """Writes a key."""
    return pb.ApiKey(
        id=key.id,
        name=key.name,
        tenant=key.tenant,
        models=key.models,
        limits=pb.KeyLimits(requests_per_minute=key.requests_per_minute, tokens_per_minute=key.tokens_per_minute),
        priority=pb.KeyPriority.ValueType(int(key.priority)),
        weight=key.weight,
        create_time=_stamp(key.created_at),
        expire_time=_stamp(key.expires_at) if key.expires_at is not None else None,
        revoke_time=_stamp(key.revoked_at) if key.revoked_at is not None else None,
    )


def key_from_proto(message: pb.ApiKey) -> ApiKey:
    """Reads a key. Raises InvalidRequest."""
    return ApiKey(
        id=message.id,
        name=message.name,
        tenant=message.tenant,
        models=tuple(message.models),
        requests_per_minute=message.limits.requests_per_minute,
        tokens_per_minute=message.limits.tokens_per_minute,
        priority=_priority(message.priority),
        weight=message.weight or 1,
        created_at=message.create_time.ToDatetime(UTC),
        expires_at=message.expire_time.ToDatetime(UTC) if message.HasField("expire_time") else None,
        revoked_at=message.revoke_time.ToDatetime(UTC) if message.HasField("revoke_time") else None,
    )


def stored_to_proto(stored: StoredKey) -> pb.StoredKey:
    """Writes a key with what recognises it."""
    return pb.StoredKey(key=key_to_proto(stored.key), sha256=stored.sha256)


def stored_from_proto(message: pb.StoredKey) -> StoredKey:
    """Reads a key with what recognises it."""
    return StoredKey(key_from_proto(message.key), message.sha256)


def _priority(value: int) -> Priority:
    try:
        return Priority(value or Priority.NORMAL)
    except ValueError as error:
        raise InvalidRequest("no such priority", reason="INVALID_KEY", metadata={"param": "priority"}) from error


def _stamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
