"""Cordons as messages and back."""

from datetime import UTC

from helios.api.registry.v1 import cordon_service_pb2 as pb
from helios.registry.cordons.records import Cordon


def cordon_to_proto(cordon: Cordon) -> pb.Cordon:
    """Writes a cordon."""
    message = pb.Cordon(worker_id=cordon.worker_id)
    message.create_time.FromDatetime(cordon.created_at)
    return message


def cordon_from_proto(message: pb.Cordon) -> Cordon:
    """Reads a cordon."""
    return Cordon(message.worker_id, message.create_time.ToDatetime(UTC))
