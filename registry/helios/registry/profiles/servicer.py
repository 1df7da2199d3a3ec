"""ProfileService over the profiles: validation and permissions."""

from datetime import UTC, datetime
from typing import Any

from helios.api.registry.v1 import profile_service_pb2 as pb
from helios.api.registry.v1.profile_service_pb2_grpc import ProfileServiceServicer
from helios.mesh.errors import InvalidRequest
from helios.registry import access
from helios.registry.names import parse_reference
from helios.registry.profiles.measure import MAX_COUNT, measure_from_proto, measure_to_proto
from helios.registry.profiles.profiles import Profiles
from helios.registry.profiles.wire import profile_to_proto


class ProfileServicer(ProfileServiceServicer):
    """Answers the contract. Errors are raised; the server's interceptor ends the call with them."""

    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles

    async def GetProfile(self, request: pb.GetProfileRequest, context: Any) -> pb.GetProfileResponse:
        """Describes a revision."""
        del context
        return profile_to_proto(await self._profiles.describe(parse_reference(request.model), has_plan=request.plan))

    async def ExchangeMeasures(self, request: pb.ExchangeMeasuresRequest, context: Any) -> pb.ExchangeMeasuresResponse:
        """Takes in what was measured; returns what is known."""
        access.check_may_measure(context)
        if max(len(request.measured), len(request.revisions)) > MAX_COUNT:
            raise InvalidRequest(f"at most {MAX_COUNT} at once", reason="INVALID_MEASURE")
        measures = self._profiles.measures
        await measures.put(list(map(measure_from_proto, request.measured)), datetime.now(UTC))
        found = await measures.of(request.revisions)
        return pb.ExchangeMeasuresResponse(measured=map(measure_to_proto, found))
