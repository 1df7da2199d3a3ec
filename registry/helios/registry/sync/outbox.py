"""What is still to be told to one agent. Bounded: an agent that does not read is sent away, and loses nothing by it."""

import asyncio
from typing import Final

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.mesh.errors import HeliosError, Unavailable

_MAX_MESSAGES: Final = 1_024
"""Acknowledgements and answers of a second at most; agents have a few questions open at a time."""


class Outbox:
    """Messages in order, and blobs whose holders have changed, each of them once. Used on one event loop.

    A session ends here, between two messages: grpc.aio can't tell a caller why its call ends while another message is
    half written.
    """

    def __init__(self) -> None:
        self._messages: list[pb.SessionResponse] = []
        self._changed_blobs: dict[str, None] = {}
        self._error: HeliosError | None = None
        self.is_ended = False
        self._news = asyncio.Event()

    def put(self, message: pb.SessionResponse) -> None:
        """Adds a message; one too many ends the session."""
        if len(self._messages) >= _MAX_MESSAGES:
            self.end(Unavailable("the agent does not read what it is told", reason="OUTBOX_FULL"))
            return
        self._messages.append(message)
        self._news.set()

    def tell_holders(self, hash_: str) -> None:
        """Has the holders of a blob be told, as they are at that time."""
        self._changed_blobs[hash_] = None
        self._news.set()

    def end(self, error: HeliosError | None = None) -> None:
        """Ends the session, with an error or without, before anything else is told. The first end counts."""
        if not self.is_ended:
            self.is_ended, self._error = True, error
        self._news.set()

    async def wait(self) -> None:
        """Waits until there is something to tell, or the session is to end.

        Raises:
            HeliosError: It is to end with this.
        """
        await self._news.wait()
        if self._error is not None:
            raise self._error

    def take(self) -> tuple[list[pb.SessionResponse], list[str]]:
        """Returns the messages, and the blobs whose holders are to be told after them; they are out then."""
        messages, self._messages = self._messages, []
        blobs, self._changed_blobs = list(self._changed_blobs), {}
        if not self.is_ended:
            self._news.clear()
        return messages, blobs
