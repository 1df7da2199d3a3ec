"""Leases as messages and back."""

from helios.api.registry.v1 import lease_service_pb2 as pb
from helios.mesh.durations import seconds_from_proto, seconds_to_proto
from helios.registry.leases.lease import Lease, Wish
from helios.registry.leases.told import ToldLease


def wish_from_proto(message: pb.AcquireLeaseRequest) -> Wish:
    """Reads what somebody asks for."""
    return Wish(
        name=message.name,
        holder=message.holder,
        ttl_seconds=seconds_from_proto(message.ttl),
        address=message.address,
        seen_epoch=message.seen_epoch,
    )


def wish_to_proto(wish: Wish) -> pb.AcquireLeaseRequest:
    """Writes what is asked for."""
    return pb.AcquireLeaseRequest(
        name=wish.name,
        holder=wish.holder,
        ttl=seconds_to_proto(wish.ttl_seconds),
        address=wish.address,
        seen_epoch=wish.seen_epoch,
    )


def lease_to_proto(lease: Lease, rest_seconds: float) -> pb.Lease:
    """Writes a lease; one that has ended is nobody's."""
    message = pb.Lease(name=lease.name, epoch=lease.epoch)
    if rest_seconds > 0:
        message.holder, message.address = lease.holder, lease.address
        message.expires_in.CopyFrom(seconds_to_proto(rest_seconds))
    return message


def lease_from_proto(message: pb.Lease) -> ToldLease:
    """Reads a lease."""
    return ToldLease(
        name=message.name,
        holder=message.holder,
        address=message.address,
        epoch=message.epoch,
        rest_seconds=seconds_from_proto(message.expires_in),
    )
