"""Versions as other components and the command line see them: values in and out, HeliosError on failure.

What changes a model takes a ``request_id``, under which it may be sent again, and the ``expected_version`` that the
caller has seen; the contract says more.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from helios.api.registry.v1 import version_service_pb2 as pb
from helios.api.registry.v1.version_service_pb2_grpc import VersionServiceStub
from helios.mesh.calls import answer_of, messages_of
from helios.mesh.channel import StubSource
from helios.registry import version_wire, wire
from helios.registry.events import Event, EventsMissed
from helios.registry.history import Move
from helios.registry.records import Model, ResolvedModel

_TIMEOUT_SECONDS: Final = 10.0
# Deleting may wait for an ingest's commit and removes files of a whole model.
_DELETE_TIMEOUT_SECONDS: Final = 60.0
_PAGE_SIZE: Final = 1_000


class VersionClient:
    """Calls on one registry. The dialer stays the caller's, who opens and closes it."""

    def __init__(self, dialer: StubSource, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._dialer = dialer
        self._timeout_seconds = timeout_seconds

    async def resolve(self, reference: str) -> ResolvedModel:
        """Returns what a reference means. Raises ModelNotFound, NotFound (TAG_NOT_FOUND), RevisionNotFound."""
        request = pb.ResolveModelRequest(model=reference)
        response = await answer_of(self._stub().ResolveModel(request, timeout=self._timeout_seconds))
        return version_wire.resolved_from_proto(response)

    async def put_tag(
        self, target: str, tag: str, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Points a tag, or the served revision where it is empty, at a revision of the same model."""
        request = pb.PutTagRequest(
            model=target, tag=tag, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().PutTag(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def delete_tag(
        self, model: str, tag: str, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Removes a tag. Raises ModelNotFound, NotFound (TAG_NOT_FOUND), Conflict (STALE_VERSION)."""
        request = pb.DeleteTagRequest(
            model=model, tag=tag, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().DeleteTag(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def roll_back(
        self,
        model: str,
        tag: str = "",
        *,
        to: str = "",
        request_id: str = "",
        expected_version: int = 0,
        is_dry_run: bool = False,
    ) -> Model:
        """Points a tag, or the served revision, where it pointed before."""
        request = pb.RollBackModelRequest(
            model=model,
            tag=tag,
            revision=to,
            request_id=request_id,
            expected_version=expected_version,
            dry_run=is_dry_run,
        )
        response = await answer_of(self._stub().RollBackModel(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def list_moves(self, model: str, *, tag: str | None = None, limit: int = _PAGE_SIZE) -> tuple[Move, ...]:
        """Returns the last moves of one pointer, or of all where ``tag`` is None, the newest first."""
        found: list[Move] = []
        token = ""
        while True:
            request = pb.ListMovesRequest(
                model=model, tag=tag, page_size=min(limit - len(found), _PAGE_SIZE), page_token=token
            )
            response = await answer_of(self._stub().ListMoves(request, timeout=self._timeout_seconds))
            found += map(version_wire.move_from_proto, response.moves)
            token = response.next_page_token
            if not token or len(found) >= limit:
                return tuple(found)

    async def put_pin(
        self,
        target: str,
        reason: str = "",
        *,
        request_id: str = "",
        expected_version: int = 0,
        is_dry_run: bool = False,
    ) -> Model:
        """Keeps a revision from being deleted."""
        request = pb.PutPinRequest(
            model=target, reason=reason, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().PutPin(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def delete_pin(
        self, target: str, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> Model:
        """Takes a pin back."""
        request = pb.DeletePinRequest(
            model=target, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().DeletePin(request, timeout=self._timeout_seconds))
        return wire.model_from_proto(response.model)

    async def delete_revision(
        self, target: str, *, request_id: str = "", expected_version: int = 0, is_dry_run: bool = False
    ) -> tuple[Model, int]:
        """Removes a revision that nothing points at; returns the model and the bytes that were freed."""
        request = pb.DeleteRevisionRequest(
            model=target, request_id=request_id, expected_version=expected_version, dry_run=is_dry_run
        )
        response = await answer_of(self._stub().DeleteRevision(request, timeout=_DELETE_TIMEOUT_SECONDS))
        return wire.model_from_proto(response.model), response.freed_bytes

    async def watch_events(self, after_version: int | None = None) -> AsyncGenerator[Event | EventsMissed, None]:
        """Yields the changes after a version, or new ones; EventsMissed first where older ones are not known any more.

        Raises:
            Unavailable: The registry stopped or is gone; go on after the last event's version.
        """
        # No timeout: the stream lasts as long as both sides live; keepalive notices a peer that is gone.
        call = self._stub().WatchEvents(pb.WatchEventsRequest(after_version=after_version))
        async with aclosing(messages_of(call)) as messages:
            async for message in messages:
                if message.HasField("resync"):
                    yield EventsMissed(message.resync.version)
                event = version_wire.event_from_proto(message.event) if message.HasField("event") else None
                if event is not None:
                    yield event

    def _stub(self) -> VersionServiceStub:
        return self._dialer.stub(VersionServiceStub)
