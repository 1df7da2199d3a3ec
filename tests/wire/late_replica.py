"""A replica that grants all the room in the world and reads only when it is told to: what is sent to it piles up in
Envoy. grpcio can't be made to do this, so HTTP/2 is spoken here by hand, as far as one answer needs it.
"""

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from google.api import httpbody_pb2

from helios.mesh.identity import IdentityFiles

_PREFACE_BYTES = 24
_WINDOW = (1 << 31) - 1
_DATA, _HEADERS, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 4, 6, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
# HPACK: `:status: 200` and `content-type` from the static table, `grpc-status` spelled out; none is remembered.
_ANSWER_HEADERS = b"\x88\x0f\x10\x10application/grpc"
_TRAILERS = b"\x00\x0bgrpc-status\x010"


class LateReplica:
    """Answers each call with an empty object, once `may_read` is set and its body is there."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()
        self.received_bytes = 0

    @asynccontextmanager
    async def serve(self, identity: IdentityFiles) -> AsyncIterator[str]:
        """Listens; gives the address."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(identity.ca))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(identity.certificate, identity.key)
        context.set_alpn_protocols(["h2"])
        async with await asyncio.start_server(self._converse, "127.0.0.1", 0, ssl=context) as server:
            host, port = server.sockets[0].getsockname()
            yield f"{host}:{port}"

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_frame(_SETTINGS, 0, 0, struct.pack("!HI", 4, _WINDOW)))
        writer.write(_frame(_WINDOW_UPDATE, 0, 0, struct.pack("!I", _WINDOW - 65535)))
        await self.may_read.wait()
        try:
            await reader.readexactly(_PREFACE_BYTES)
            while True:
                head = await reader.readexactly(9)
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                if kind == _DATA:
                    self.received_bytes += len(payload)
                if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                    writer.write(_answer(stream))
                if kind in (_SETTINGS, _PING) and not flags & _ACK:
                    writer.write(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        except (asyncio.IncompleteReadError, ConnectionError):
            # Envoy has left.
            writer.close()


def _answer(stream: int) -> bytes:
    body = httpbody_pb2.HttpBody(content_type="application/json", data=b"{}").SerializeToString()
    message = b"\x00" + len(body).to_bytes(4, "big") + body
    headers = _frame(_HEADERS, _END_HEADERS, stream, _ANSWER_HEADERS)
    trailers = _frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, _TRAILERS)
    return headers + _frame(_DATA, 0, stream, message) + trailers


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
