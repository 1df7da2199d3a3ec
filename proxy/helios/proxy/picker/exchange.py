"""One request's conversation with Envoy: how its body comes, and answers in the order that Envoy wants.

The body of a prompt of ordinary length follows its headers unasked, mostly in the same packet (`filters.picker`): a
second exchange would cost a request more than its body does. Then the answer to the headers says where to go, and each
part of the body gets a word, too. Another body is asked for where it is needed, comes whole, and has the answer.
"""

from typing import Any, Final

import grpc.aio
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

from helios.proxy.picker.request import FRAME_BYTES


class Exchange:
    """What is read and written between the request's headers and the end of its stream."""

    def __init__(self, context: Any, request: Any) -> None:
        """``request`` is the first message: the headers."""
        self.request = request
        self._context = context
        protocol = request.protocol_config
        # The route of requests that name no model has their bodies buffered, whatever the filter is set to.
        is_streamed = protocol.request_body_mode == processing_mode_pb2.ProcessingMode.STREAMED
        self._is_pushed: bool = is_streamed and protocol.send_body_without_waiting_for_header_response
        self._is_ended: bool = request.request_headers.end_of_stream
        self._part_count = 0
        self._pushed = b""
        self._is_asked = False

    async def read_pushed(self) -> None:
        """Reads a body that follows unasked, wanted or not: what is not read counts against its connection.

        Its end may come later: apart, or in trailers, which Envoy keeps until its headers are answered.
        """
        if not self._is_pushed:
            return
        body = bytearray()
        while not self._is_ended and not _is_whole(body):
            if (part := await self._read_part()) is not None:
                body += part
                self._part_count += 1
        self._pushed = bytes(body)

    async def body(self) -> bytes | None:
        """The body; None where the request has none."""
        if self._is_pushed:
            return self._pushed if self._part_count else None
        self._is_asked = True
        await self._context.write(_ASK_BODY)
        message = await self._context.read()
        if message is grpc.aio.EOF or not message.HasField("request_body"):
            # A request that ends with its headers has no body to send.
            return None
        return bytes(message.request_body.body)

    def drop_body(self) -> None:
        """Forgets a body that was read; its parts stay to be answered."""
        self._pushed = b""

    def part(self, response: Any) -> Any:
        """The part of a response that answers what Envoy said last."""
        return response.request_body if self._is_asked else response.request_headers

    async def answer(self, response: Any) -> None:
        """Sends the answer that lets the request go on."""
        await self._context.write(response)
        for _ in range(self._part_count):
            await self._context.write(_GO_ON)

    async def let_rest_go_on(self) -> None:
        """Answers what is left of a pushed body: mostly nothing, else its end, or nothing until the request is over."""
        while self._is_pushed and not self._is_ended:
            if await self._read_part() is not None:
                await self._context.write(_GO_ON)

    async def _read_part(self) -> bytes | None:
        message = await self._context.read()
        if message is grpc.aio.EOF:
            self._is_ended = True
            return None
        self._is_ended = message.request_body.end_of_stream
        return bytes(message.request_body.body)


def _is_whole(body: bytearray) -> bool:
    """Whether it is a gRPC message, as all bodies are."""
    return len(body) >= FRAME_BYTES and len(body) - FRAME_BYTES >= int.from_bytes(body[1:FRAME_BYTES], "big")


def _body_asked() -> Any:
    response = ext_proc.ProcessingResponse()
    # An answer to the headers that changes nothing.
    response.request_headers.response.SetInParent()
    response.mode_override.request_header_mode = processing_mode_pb2.ProcessingMode.SEND
    response.mode_override.response_header_mode = processing_mode_pb2.ProcessingMode.SKIP
    response.mode_override.request_body_mode = processing_mode_pb2.ProcessingMode.BUFFERED
    return response


def _gone_on() -> Any:
    response = ext_proc.ProcessingResponse()
    response.request_body.SetInParent()
    return response


_ASK_BODY: Final = _body_asked()
_GO_ON: Final = _gone_on()
