"""A peer that says when each frame is sent, and a server that it can be rude to."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import h2.config
import h2.connection
import h2.events
import h2.settings
from h2.exceptions import ProtocolError
from hyperframe.frame import Frame

from helios.mesh.http2.limits import Limits
from helios.mesh.http2.server import Http2Server
from helios.mesh.http2.wire import frame
from helios.mesh.server import MeshServer, ServerOptions
from tests.mesh.http2.echo import SERVICE, Echo

Headers = Mapping[str, str]


class Peer:
    """A client that sends what it likes; h2 only reads and writes frames for it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        config = h2.config.H2Configuration(client_side=True, header_encoding=None, validate_outbound_headers=False)
        self.http2 = h2.connection.H2Connection(config)
        self.events: list[h2.events.Event] = []
        self._reader = reader
        self.writer = writer

    async def hello(self) -> None:
        """Sends preface and settings, and reads the server's."""
        self.http2.initiate_connection()
        await self.flush()
        await self.until(h2.events.SettingsAcknowledged)

    async def flush(self, *frames: Frame) -> None:
        """Sends what h2 made, and frames of the test's own making."""
        self.writer.write(self.http2.data_to_send() + b"".join(entry.serialize() for entry in frames))
        await self.writer.drain()

    async def call(
        self, method: str, message: bytes = b"", *, is_whole: bool = True, headers: Headers = MappingProxyType({})
    ) -> int:
        """Begins a call."""
        stream_id = self.http2.get_next_available_stream_id()
        fields = {":method": "POST", ":scheme": "http", ":authority": "x", ":path": f"/{SERVICE}/{method}"}
        fields |= {"content-type": "application/grpc", "te": "trailers"}
        fields |= headers
        self.http2.send_headers(stream_id, list(fields.items()))
        if is_whole:
            self.http2.send_data(stream_id, frame(message), end_stream=True)
        await self.flush()
        return stream_id

    async def send(self, stream_id: int, data: bytes) -> None:
        """Sends bytes of a request as the stream's window allows."""
        async with asyncio.timeout(5):
            for start in range(0, len(data), 16_000):
                while self.http2.local_flow_control_window(stream_id) < 16_000:
                    await self.read()
                self.http2.send_data(stream_id, data[start : start + 16_000])
                await self.flush()

    async def until(
        self, kind: type[h2.events.Event], stream_id: int | None = None, seconds: float = 5
    ) -> h2.events.Event:
        """Reads until an event comes. Raises ConnectionError when the server closes before that."""
        async with asyncio.timeout(seconds):
            while True:
                for event in self.events:
                    if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                        self.events.remove(event)
                        return event
                await self.read()

    async def read(self) -> None:
        """Takes in what has arrived."""
        data = await self._reader.read(1 << 16)
        if not data:
            raise ConnectionError("closed by the server")
        self.events += self.http2.receive_data(data)
        await self.flush()

    async def status(self, stream_id: int) -> str:
        """Returns the gRPC status of a call that ended, or the HTTP status of one that is no gRPC."""
        kinds = (h2.events.TrailersReceived, h2.events.ResponseReceived)
        async with asyncio.timeout(5):
            while True:
                for event in self.events:
                    if isinstance(event, kinds) and event.stream_id == stream_id:
                        headers = {bytes(name): bytes(value) for name, value in event.headers or ()}
                        http_status = headers.get(b":status", b"200")
                        if b"grpc-status" in headers or http_status != b"200":
                            return headers.get(b"grpc-status", http_status).decode()
                await self.read()

    async def closed(self, seconds: float = 5.0) -> int | None:
        """Waits until the server has closed; returns the code of its GOAWAY, if there was one."""
        async with asyncio.timeout(seconds):
            try:
                while True:
                    await self.read()
            except (ConnectionError, ProtocolError):
                pass
        codes = [event.error_code for event in self.events if isinstance(event, h2.events.ConnectionTerminated)]
        return None if not codes or codes[0] is None else int(codes[0])


def plain_server(echo: Echo, directory: Path, limits: Limits) -> MeshServer:
    """The echo without TLS, at a socket in a directory."""
    server = MeshServer(
        listen=f"unix:{directory}/server.sock",
        identity=None,
        policy={SERVICE: frozenset({"*"})},
        options=ServerOptions(drain_seconds=0.0, transport="http2"),
    )
    assert isinstance(server.grpc, Http2Server)
    server.grpc._limits = limits
    echo.add_to(server)
    server.serve(SERVICE)
    return server
