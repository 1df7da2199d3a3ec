"""Other nodes' storage agents as sources.

gRPC's synchronous client, for the transfer engine reads in threads: bytes that came through the event loop would pass a
thread's border twice. A channel is made for each blob, so it has the certificate of the hour.
"""

import threading
import time
from typing import Any, Final

import grpc

from helios.api.storage.v1 import blob_service_pb2 as pb
from helios.mesh.errors import BlobNotFound, HeliosError
from helios.mesh.identity import IdentityFiles, server_name
from helios.mesh.status import error_from_rpc
from helios.mesh.transfer.source import Sink, SourceFault, SourceState, source_unavailable
from helios.storage.blob_messages import decode_piece
from helios.storage.blob_servicer import SERVICE_NAME
from helios.storage.manifest import Digest

_READ_SECONDS: Final = 60.0
"""One range: 8 MiB at 140 kB/s. A peer that is slower is none."""

_STALL_SECONDS: Final = 20.0
"""A peer that lives and sends nothing for so long has a disk that hangs, say. The engine looks when bytes come."""

_LOOKS: Final = 20
"""How often it is looked within that time."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.enable_http_proxy", 0),
    # Each blob has a connection of its own: one for all would carry all of a node's fetches in one TLS stream.
    ("grpc.use_local_subchannel_pool", 1),
    # A peer that was stopped, or cut off, without a word: its reads end within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class PeerSource:
    """One blob of one peer; a `RangeSource`. It has no ETag, so it wants verifying chunk by chunk.

    While it reads, a thread ends the calls that bring nothing: gRPC has a deadline for a whole call only.
    """

    def __init__(
        self, target: str, digest: Digest, *, identity: IdentityFiles | None, stall_seconds: float = _STALL_SECONDS
    ) -> None:
        """Takes the peer's address; without an identity it is dialled without TLS."""
        self._target = target
        self._digest = digest
        self._identity = identity
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._channel: grpc.Channel | None = None
        self._calls: set[Any] = set()
        # Until when the next message of a call is waited for. What the sink takes its time for is not the peer's.
        self._patience: dict[Any, float] = {}
        self._silent: set[Any] = set()
        self._is_watched = False

    def describe(self) -> SourceState:
        """The name says how large it is; whether it is there, reading tells."""
        return SourceState(self._digest.size_bytes)

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        """Reads a range.

        Raises:
            SourceFault: The peer sends nothing.
            HeliosError: BlobNotFound; Unavailable (SOURCE_UNAVAILABLE).
        """
        del state
        request = pb.ReadBlobRequest(hash=self._digest.hash, offset=offset, limit=length)
        call = self._open_call(request)
        try:
            while (message := self._next(call)) is not None:
                sink(decode_piece(message))
        except grpc.RpcError as error:
            with self._lock:
                is_silent = call in self._silent
            if is_silent:
                raise SourceFault(f"{self._target} sends nothing") from error
            raise _error_of(error, self._target) from error
        finally:
            call.cancel()
            with self._changed:
                self._calls.discard(call)
                self._silent.discard(call)
                self._changed.notify_all()

    def close(self) -> None:
        with self._lock:
            channel, self._channel = self._channel, None
            calls = list(self._calls)
        for call in calls:
            call.cancel()
        if channel is not None:
            channel.close()

    def _next(self, call: Any) -> Any:
        """The next message; None at the end."""
        with self._lock:
            self._patience[call] = time.monotonic() + self._stall_seconds
        try:
            return next(call, None)
        finally:
            with self._lock:
                self._patience.pop(call)

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._is_watched = bool(self._calls)
                if not self._is_watched:
                    return
                now = time.monotonic()
                silent = [call for call, end in self._patience.items() if now >= end]
                self._silent.update(silent)
            for call in silent:
                call.cancel()
            with self._changed:
                self._changed.wait_for(lambda: not self._calls, self._stall_seconds / _LOOKS)

    def _open_call(self, request: pb.ReadBlobRequest) -> Any:
        with self._lock:
            if self._channel is None:
                self._channel = self._connect()
            method: Any = self._channel.unary_stream(
                f"/{SERVICE_NAME}/ReadBlob", request_serializer=pb.ReadBlobRequest.SerializeToString
            )
            call = method(request, timeout=_READ_SECONDS)
            self._calls.add(call)
            if not self._is_watched:
                self._is_watched = True
                threading.Thread(target=self._watch, name="peer watch", daemon=True).start()
            return call

    def _connect(self) -> grpc.Channel:
        if self._identity is None:
            return grpc.insecure_channel(self._target, options=_OPTIONS)
        try:
            pem = self._identity.read()
        except OSError as error:
            raise source_unavailable(f"the certificate can't be read: {error.strerror}") from error
        credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", server_name("storage")))
        return grpc.secure_channel(self._target, credentials, options=options)


def _error_of(error: Any, target: str) -> HeliosError:
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return BlobNotFound(f"{target} does not have the blob")
    known = error_from_rpc(error)
    return source_unavailable(f"{target}: {known.message}", retry_after_seconds=known.retry_after_seconds)
