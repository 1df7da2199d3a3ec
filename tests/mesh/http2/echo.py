"""A service of raw bytes that does what tests of a transport need, and what its handlers have seen."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc
import grpc.aio

from helios.mesh import errors
from helios.mesh.server import MeshServer

SERVICE: Final = "test.Echo"


class Echo:
    """Handlers of all kinds and both styles."""

    def __init__(self) -> None:
        self.cancelled_at: list[float] = []
        self.running_count = 0
        self.written_count = 0
        self.read_count = 0
        self.may_read = asyncio.Event()

    def add_to(self, server: MeshServer) -> None:
        """Registers the service as generated code does."""
        kinds: dict[str, tuple[Callable[..., Any], Any]] = {
            "Unary": (grpc.unary_unary_rpc_method_handler, self.unary),
            "Fail": (grpc.unary_unary_rpc_method_handler, self.fail),
            "Size": (grpc.unary_unary_rpc_method_handler, self.size),
            "Code": (grpc.unary_unary_rpc_method_handler, self.code),
            "Remaining": (grpc.unary_unary_rpc_method_handler, self.remaining),
            "Wait": (grpc.unary_stream_rpc_method_handler, self.wait),
            "Write": (grpc.unary_stream_rpc_method_handler, self.write),
            "Yield": (grpc.unary_stream_rpc_method_handler, self.generate),
            "Flood": (grpc.unary_stream_rpc_method_handler, self.flood),
            "Break": (grpc.unary_stream_rpc_method_handler, self.break_off),
            "Sum": (grpc.stream_unary_rpc_method_handler, self.sum),
            "Both": (grpc.stream_stream_rpc_method_handler, self.both),
            "Read": (grpc.stream_stream_rpc_method_handler, self.read),
        }
        handlers = {name: make(behavior) for name, (make, behavior) in kinds.items()}
        server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def unary(self, request: bytes, context: Any) -> bytes:
        """Sends the request back, and its metadata as both kinds of the response's."""
        metadata = [(key, value) for key, value in context.invocation_metadata() if key.startswith("x-")]
        await context.send_initial_metadata([(f"initial-{key}", value) for key, value in metadata])
        context.set_trailing_metadata([(f"trailing-{key}", value) for key, value in metadata])
        return request

    async def fail(self, request: bytes, context: Any) -> bytes:
        """Raises."""
        raise errors.Draining(request.decode(), retry_after_seconds=3)

    async def size(self, request: bytes, context: Any) -> Any:
        """Answers with so many bytes; with a number, which is no message, for one below zero."""
        size = int(request)
        return bytes(size) if size >= 0 else size

    async def code(self, request: bytes, context: Any) -> bytes:
        """Sets a status instead of raising."""
        context.set_code(grpc.StatusCode.ABORTED)
        context.set_details(request.decode())
        return b""

    async def remaining(self, request: bytes, context: Any) -> bytes:
        """Says how long the call may take."""
        return str(context.time_remaining()).encode()

    async def wait(self, request: bytes, context: Any) -> None:
        """Writes once and then waits to be cancelled."""
        self.running_count += 1
        try:
            await context.write(b"here")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled_at.append(time.monotonic())
            raise
        finally:
            self.running_count -= 1

    async def write(self, request: bytes, context: Any) -> None:
        """Writes "count size"."""
        count, size = map(int, request.split())
        for number in range(count):
            await context.write(number.to_bytes(4, "big") + bytes(size))

    async def generate(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Yields numbers."""
        for number in range(int(request)):
            yield str(number).encode()

    async def flood(self, request: bytes, context: Any) -> None:
        """Writes without end."""
        while True:
            await context.write(bytes(32 << 10))
            self.written_count += 1

    async def break_off(self, request: bytes, context: Any) -> None:
        """Writes once, then fails."""
        await context.write(b"first")
        raise errors.ReplicaLost("it broke")

    async def sum(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        """Adds the lengths of all messages."""
        total = 0
        async for request in requests:
            total += len(request)
        return str(total).encode()

    async def both(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Sends each message back."""
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)

    async def read(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Reads nothing until it may."""
        await self.may_read.wait()
        async for _ in requests:
            self.read_count += 1
