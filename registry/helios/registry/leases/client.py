"""Leases as other components see them: values in and out, HeliosError on failure.

A holder tells two failures of ``renew`` apart: Conflict (LEASE_LOST) says that it is not the holder any more; any other
error that the registry could not be asked.
"""

from typing import Final

from helios.api.registry.v1 import lease_service_pb2 as pb
from helios.api.registry.v1.lease_service_pb2_grpc import LeaseServiceStub
from helios.mesh.calls import answer_of
from helios.mesh.channel import StubSource
from helios.mesh.durations import seconds_to_proto
from helios.registry.leases.lease import Grant, Wish
from helios.registry.leases.told import ToldLease
from helios.registry.leases.wire import lease_from_proto, wish_to_proto

__all__ = ["Grant", "LeaseClient", "ToldLease", "Wish"]

# Short: a lease is renewed several times within its TTL, and an answer that comes after its end helps nobody.
_TIMEOUT_SECONDS: Final = 2.0


class LeaseClient:
    """Calls on one registry, each with ``timeout_seconds``. The dialer stays the caller's."""

    def __init__(self, dialer: StubSource, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._dialer = dialer
        self._timeout_seconds = timeout_seconds

    async def acquire(self, wish: Wish) -> tuple[bool, ToldLease]:
        """Asks for a lease; returns whether it was granted, and the lease as it stands: the asker's, or another's."""
        response = await answer_of(self._stub().AcquireLease(wish_to_proto(wish), timeout=self._timeout_seconds))
        return response.granted, lease_from_proto(response.lease)

    async def renew(self, grant: Grant, ttl_seconds: float) -> ToldLease:
        """Has a lease end ``ttl_seconds`` from now. Raises Conflict (LEASE_LOST)."""
        ttl = seconds_to_proto(ttl_seconds)
        request = pb.RenewLeaseRequest(name=grant.name, holder=grant.holder, epoch=grant.epoch, ttl=ttl)
        response = await answer_of(self._stub().RenewLease(request, timeout=self._timeout_seconds))
        return lease_from_proto(response.lease)

    async def release(self, grant: Grant) -> ToldLease:
        """Ends a lease at once; nothing happens where it was lost already."""
        request = pb.ReleaseLeaseRequest(name=grant.name, holder=grant.holder, epoch=grant.epoch)
        response = await answer_of(self._stub().ReleaseLease(request, timeout=self._timeout_seconds))
        return lease_from_proto(response.lease)

    async def list(self) -> list[ToldLease]:
        """Returns the leases that were ever granted, by name."""
        response = await answer_of(self._stub().ListLeases(pb.ListLeasesRequest(), timeout=self._timeout_seconds))
        return [lease_from_proto(lease) for lease in response.leases]

    def _stub(self) -> LeaseServiceStub:
        return self._dialer.stub(LeaseServiceStub)
