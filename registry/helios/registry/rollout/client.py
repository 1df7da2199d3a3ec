"""Rollouts as other components and the command line see them: values in and out, HeliosError on failure."""

from typing import Final

from helios.api.registry.v1 import rollout_service_pb2 as pb
from helios.api.registry.v1.rollout_service_pb2_grpc import RolloutServiceStub
from helios.mesh.calls import answer_of
from helios.mesh.channel import StubSource
from helios.registry import wire
from helios.registry.records import Model
from helios.registry.rollout.steps import RolloutStep
from helios.registry.rollout.wire import step_from_proto

_TIMEOUT_SECONDS: Final = 10.0


class RolloutClient:
    """Calls on one registry. The dialer stays the caller's, who opens and closes it."""

    def __init__(self, dialer: StubSource, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._dialer = dialer
        self._timeout_seconds = timeout_seconds

    async def put(
        self, target: str, percent: int, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Sends a share of a model's requests to the revision that a reference means."""
        request = pb.PutRolloutRequest(
            model=target,
            weight_percent=percent,
            request_id=request_id,
            expected_version=expected_version,
            dry_run=is_dry_run,
        )
        response = await answer_of(self._stub().PutRollout(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def promote(
        self, model: str, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Serves the canary. Raises PreconditionFailed (NO_ROLLOUT)."""
        request = pb.PromoteRolloutRequest(
            model=model, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().PromoteRollout(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def abort(
        self, model: str, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Gives the canary up. Raises PreconditionFailed (NO_ROLLOUT)."""
        request = pb.AbortRolloutRequest(
            model=model, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().AbortRollout(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def list_steps(self, model: str, *, limit: int = 100) -> tuple[RolloutStep, ...]:
        """Returns what was done to a model's rollouts, at most 1,000 steps, the newest first."""
        request = pb.ListRolloutStepsRequest(model=model, page_size=limit)
        response = await answer_of(self._stub().ListRolloutSteps(request, timeout=self._timeout_seconds))
        return tuple(map(step_from_proto, response.steps))

    def _stub(self) -> RolloutServiceStub:
        return self._dialer.stub(RolloutServiceStub)
