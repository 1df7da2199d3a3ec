"""UsageService over the usage: validation, permissions, pages, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final

from helios.api.registry.v1 import usage_service_pb2 as pb
from helios.api.registry.v1.usage_service_pb2_grpc import UsageServiceServicer
from helios.registry import access
from helios.registry.names import check_name
from helios.registry.pages import make_token, page_size, read_token
from helios.registry.store import Store
from helios.registry.usage import wire
from helios.registry.usage.usage import Usage

_DEFAULT_HOURS: Final = 24
# Longer than anything is kept.
_MAX_HOURS: Final = 366 * 24
# A page: each model's forecasts are scored by some two hundred rows.
_MAX_MODELS: Final = 100
_TOKEN: Final = "usage"  # noqa: S105 - the kind of a page's token


class UsageServicer(UsageServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, usage: Usage, store: Store) -> None:
        self._usage = usage
        self._store = store

    async def ReportUsage(self, request: pb.ReportUsageRequest, context: Any) -> pb.ReportUsageResponse:
        """Adds counts."""
        access.check_may_report(context)
        deltas = wire.deltas_from_proto(request)
        return pb.ReportUsageResponse(sequence=await self._usage.report(request.reporter, request.sequence, deltas))

    async def ListUsage(self, request: pb.ListUsageRequest, context: Any) -> pb.ListUsageResponse:
        """Lists models with their usage."""
        del context
        size, after = min(page_size(request.page_size), _MAX_MODELS), read_token(request.page_token, _TOKEN)
        page = await self._usage.page(after, size + 1, _hours(request.hour_count))
        token = make_token(_TOKEN, page[size - 1].model) if len(page) > size else ""
        return pb.ListUsageResponse(models=map(wire.usage_to_proto, page[:size]), next_page_token=token)

    async def GetUsage(self, request: pb.GetUsageRequest, context: Any) -> pb.GetUsageResponse:
        """Returns a model's usage, hour for hour."""
        del context
        model = await self._store.get_model(check_name(request.model, param="model"))
        (usage,) = await self._usage.of([model.name], _hours(request.hour_count))
        return pb.GetUsageResponse(usage=wire.usage_to_proto(usage), hours=map(wire.hour_to_proto, usage.hours))

    async def ListBlobHeat(self, request: pb.ListBlobHeatRequest, context: Any) -> pb.ListBlobHeatResponse:
        """Lists the hottest blobs."""
        del context
        found = await self._usage.heat(_hours(request.hour_count), page_size(request.limit))
        return pb.ListBlobHeatResponse(blobs=map(wire.heat_to_proto, found))

    # An iterator of its own, closed here: one that is dropped half-way would be closed by the garbage collector.
    async def WatchWarmTargets(
        self, request: pb.WatchWarmTargetsRequest, context: Any
    ) -> AsyncIterator[pb.WatchWarmTargetsResponse]:
        """Sends all targets, now and whenever forecasts were made."""
        del request, context
        async with aclosing(self._usage.watch_targets()) as watched:
            async for targets in watched:
                yield pb.WatchWarmTargetsResponse(targets=map(wire.target_to_proto, targets))


def _hours(asked: int) -> int:
    return min(asked, _MAX_HOURS) or _DEFAULT_HOURS
