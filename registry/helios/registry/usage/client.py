"""Usage as other components and the command line see it: values in and out, HeliosError on failure."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from helios.api.registry.v1 import usage_service_pb2 as pb
from helios.api.registry.v1.usage_service_pb2_grpc import UsageServiceStub
from helios.mesh.calls import answer_of, messages_of
from helios.mesh.channel import StubSource
from helios.registry.usage import wire
from helios.registry.usage.answers import ModelUsage
from helios.registry.usage.records import BlobHeat, Counts, Delta, Expectation, Forecast, UsageHour, hour_of, start_of
from helios.registry.usage.score import Score
from helios.registry.usage.targets import Rung, Target

__all__ = [
    "BlobHeat", "Counts", "Delta", "Expectation", "Forecast", "ModelUsage", "Rung", "Score", "Target", "UsageClient",
    "UsageHour", "hour_of", "start_of",
]  # fmt: skip

_TIMEOUT_SECONDS: Final = 10.0
_PAGE_SIZE: Final = 1_000


class UsageClient:
    """Calls on one registry. The dialer stays the caller's."""

    def __init__(self, dialer: StubSource, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._dialer = dialer
        self._timeout_seconds = timeout_seconds

    async def report(self, reporter: str, sequence: int, deltas: Sequence[Delta]) -> int:
        """Adds a report; the same one sent again counts once. Returns the number of the last one taken."""
        request = pb.ReportUsageRequest(reporter=reporter, sequence=sequence, deltas=wire.deltas_to_proto(deltas))
        response = await answer_of(self._stub().ReportUsage(request, timeout=self._timeout_seconds))
        return int(response.sequence)

    async def list(self, *, hour_count: int = 0) -> list[ModelUsage]:
        """Returns the usage of all models, by name, without single hours."""
        found: list[ModelUsage] = []
        token = ""
        while True:
            request = pb.ListUsageRequest(page_size=_PAGE_SIZE, page_token=token, hour_count=hour_count)
            response = await answer_of(self._stub().ListUsage(request, timeout=self._timeout_seconds))
            found += map(wire.usage_from_proto, response.models)
            token = response.next_page_token
            if not token:
                return found

    async def get(self, model: str, *, hour_count: int = 0) -> ModelUsage:
        """Returns a model's usage. Raises ModelNotFound."""
        request = pb.GetUsageRequest(model=model, hour_count=hour_count)
        response = await answer_of(self._stub().GetUsage(request, timeout=self._timeout_seconds))
        return wire.usage_from_proto(response.usage, response.hours)

    async def heat(self, *, limit: int = 0, hour_count: int = 0) -> tuple[BlobHeat, ...]:
        """Returns the hottest blobs, the hottest first."""
        request = pb.ListBlobHeatRequest(limit=limit, hour_count=hour_count)
        response = await answer_of(self._stub().ListBlobHeat(request, timeout=self._timeout_seconds))
        return tuple(map(wire.heat_from_proto, response.blobs))

    async def watch_targets(self) -> AsyncGenerator[tuple[Target, ...], None]:
        """Yields all targets, now and whenever forecasts were made. Raises HeliosError when the watch breaks."""
        # No timeout: the stream lasts as long as both sides live; keepalive notices a peer that is gone.
        call = self._stub().WatchWarmTargets(pb.WatchWarmTargetsRequest())
        async with aclosing(messages_of(call)) as messages:
            async for message in messages:
                known = (wire.target_from_proto(target) for target in message.targets)
                yield tuple(target for target in known if target is not None)

    def _stub(self) -> UsageServiceStub:
        return self._dialer.stub(UsageServiceStub)
