"""Profiles as proxies and the command line see them: HeliosError on failure."""

from collections.abc import Collection, Sequence
from typing import Final

from helios.api.registry.v1 import profile_service_pb2 as pb
from helios.api.registry.v1.profile_service_pb2_grpc import ProfileServiceStub
from helios.mesh.calls import answer_of
from helios.mesh.channel import StubSource
from helios.registry.profiles.measure import Measure, measure_from_proto, measure_to_proto

_TIMEOUT_SECONDS: Final = 10.0
# A plan waits for another one, and takes its own deadline at most.
_PLAN_TIMEOUT_SECONDS: Final = 300.0


class ProfileClient:
    """Calls on one registry. The dialer stays the caller's, who opens and closes it."""

    def __init__(self, dialer: StubSource, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._dialer = dialer
        self._timeout_seconds = timeout_seconds

    async def get(self, reference: str, *, has_plan: bool = False) -> pb.GetProfileResponse:
        """Describes the revision that a reference means; as a message, for it is only shown."""
        request = pb.GetProfileRequest(model=reference, plan=has_plan)
        timeout = _PLAN_TIMEOUT_SECONDS if has_plan else self._timeout_seconds
        return await answer_of(self._stub().GetProfile(request, timeout=timeout))

    async def exchange(self, measured: Sequence[Measure], revisions: Collection[str]) -> list[Measure]:
        """Tells what was measured; returns what is known of some revisions."""
        request = pb.ExchangeMeasuresRequest(measured=map(measure_to_proto, measured), revisions=revisions)
        response = await answer_of(self._stub().ExchangeMeasures(request, timeout=self._timeout_seconds))
        return list(map(measure_from_proto, response.measured))

    def _stub(self) -> ProfileServiceStub:
        return self._dialer.stub(ProfileServiceStub)
