"""Bodies that are sent along with their headers, by clients that send them in their own way, through the real Envoy."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h2.config
import h2.connection
import h2.events
import pytest
from google.api import httpbody_pb2

from tests.proxy.harness import World
from tests.proxy.test_gateway import running_edge
from tests.proxy.test_keys_gateway import guarded_edge

pytestmark = pytest.mark.leaks("Envoy keeps connections to servers of this process until it is gone")
REST = {":path": "/v1/completions", "content-type": "application/json"}
NATIVE = {
    ":path": "/helios.api.inference.v1.OpenAIService/CreateCompletion",
    "content-type": "application/grpc",
    "te": "trailers",
}
BODY = json.dumps({"model": "m", "prompt": "x" * 1000}).encode()


class Client:
    """An HTTP/2 client that says when each frame is sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        config = h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False)
        self._http2 = h2.connection.H2Connection(config)
        self._reader, self._writer = reader, writer

    @staticmethod
    @asynccontextmanager
    async def connected(address: str) -> AsyncIterator["Client"]:
        """A connection without TLS."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            client = Client(reader, writer)
            client._http2.initiate_connection()
            await client._flush()
            yield client
        finally:
            writer.close()
            await writer.wait_closed()

    async def begin(self, headers: dict[str, str], size: int) -> None:
        """Sends the headers of a request, which say how long its body is."""
        fields = {":method": "POST", ":scheme": "http", ":authority": "x"} | headers | {"content-length": str(size)}
        self._http2.send_headers(1, [*fields.items()])
        await self._flush()

    async def send(self, data: bytes, *, is_end: bool = False) -> None:
        """Sends a part of the body."""
        self._http2.send_data(1, data, end_stream=is_end)
        await self._flush()

    async def end_with_trailers(self) -> None:
        """Ends the request with trailers."""
        self._http2.send_headers(1, [("x-checksum", "1")], end_stream=True)
        await self._flush()

    async def answer(self) -> dict[str, str]:
        """Headers and trailers of the answer."""
        found: dict[str, str] = {}
        async with asyncio.timeout(20):
            while True:
                data = await self._reader.read(1 << 16)
                assert data, "Envoy has closed the connection"
                for event in self._http2.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                        found |= {str(name): str(value) for name, value in event.headers}
                    if isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                        return found
                await self._flush()

    async def _flush(self) -> None:
        self._writer.write(self._http2.data_to_send())
        await self._writer.drain()


def framed(body: bytes) -> bytes:
    """A body as native gRPC has it."""
    message: bytes = httpbody_pb2.HttpBody(content_type="application/json", data=body).SerializeToString()
    return b"\0" + len(message).to_bytes(4, "big") + message


@pytest.mark.parametrize(
    ("headers", "body"),
    [(REST, BODY), (NATIVE | {"x-helios-model": "m"}, framed(BODY)), (NATIVE, framed(BODY))],
    ids=["REST", "gRPC", "gRPC that names no model"],
)
async def test_the_end_of_a_request_may_come_apart_or_in_trailers(
    world: World, headers: dict[str, str], body: bytes
) -> None:
    world.registry.put("m")
    async with running_edge(world) as edge:
        async with Client.connected(edge.address) as client:
            await client.begin(headers, len(body))
            for part in (body[:3], body[3:700], body[700:], b""):
                await client.send(part, is_end=not part)
            assert (await client.answer())[":status"] == "200"
        async with Client.connected(edge.address) as client:
            await client.begin(headers, len(body))
            await client.send(body)
            await client.end_with_trailers()
            answer = await client.answer()
        assert (answer[":status"], answer.get("grpc-status", "0")) == ("200", "0")
        assert [json.loads(call.request.data)["prompt"] for call in edge.replica.calls] == ["x" * 1000] * 2


async def test_a_body_that_names_no_model_is_refused(world: World) -> None:
    body = json.dumps({"prompt": "x" * 1000}).encode()
    async with running_edge(world) as edge, Client.connected(edge.address) as client:
        await client.begin(REST, len(body))
        await client.send(body, is_end=True)
        assert (await client.answer())[":status"] == "400"


async def test_who_has_no_key_is_told_before_a_body_is_waited_for(world: World) -> None:
    async with guarded_edge(world) as (edge, _), Client.connected(edge.address) as client:
        await client.begin(NATIVE | {"x-helios-model": "m"}, 5000)
        await client.send(b"\0")
        assert (await client.answer())["grpc-status"] == "16"
