"""LeaseService over the rows."""

from typing import Any

import structlog

from helios.api.registry.v1 import lease_service_pb2 as pb
from helios.api.registry.v1.lease_service_pb2_grpc import LeaseServiceServicer
from helios.mesh.durations import seconds_from_proto
from helios.registry import access
from helios.registry.leases import wire
from helios.registry.leases.lease import Grant
from helios.registry.leases.store import LeaseStore

log = structlog.get_logger()


class LeaseServicer(LeaseServiceServicer):
    """Answers the contract."""

    def __init__(self, store: LeaseStore) -> None:
        self._store = store

    async def AcquireLease(self, request: pb.AcquireLeaseRequest, context: Any) -> pb.AcquireLeaseResponse:
        """Grants a lease, or says who holds it."""
        access.check_may_lead(context)
        is_granted, lease, rest_seconds = await self._store.acquire(wire.wish_from_proto(request))
        if is_granted:
            log.info("lease granted", lease=lease.name, holder=lease.holder, epoch=lease.epoch)
        return pb.AcquireLeaseResponse(granted=is_granted, lease=wire.lease_to_proto(lease, rest_seconds))

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Any) -> pb.RenewLeaseResponse:
        """Has a lease end later."""
        access.check_may_lead(context)
        grant = Grant(request.name, request.holder, request.epoch)
        lease, rest_seconds = await self._store.renew(grant, seconds_from_proto(request.ttl))
        return pb.RenewLeaseResponse(lease=wire.lease_to_proto(lease, rest_seconds))

    async def ReleaseLease(self, request: pb.ReleaseLeaseRequest, context: Any) -> pb.ReleaseLeaseResponse:
        """Ends a lease at once."""
        access.check_may_lead(context)
        lease, rest_seconds = await self._store.release(Grant(request.name, request.holder, request.epoch))
        if not rest_seconds:
            log.info("lease released", lease=request.name, holder=request.holder, epoch=request.epoch)
        return pb.ReleaseLeaseResponse(lease=wire.lease_to_proto(lease, rest_seconds))

    async def ListLeases(self, request: pb.ListLeasesRequest, context: Any) -> pb.ListLeasesResponse:
        """Lists leases."""
        leases = await self._store.list()
        return pb.ListLeasesResponse(leases=[wire.lease_to_proto(lease, rest) for lease, rest in leases])
