"""One request's conversation with Envoy: its headers, its body where that was asked for, and what an answer is of."""

from typing import Any, Final

import grpc.aio
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc


class Exchange:
    """What is read and written between the request's headers and its answer."""

    def __init__(self, context: Any, request: Any) -> None:
        """``request`` is the first message: the headers."""
        self.request = request
        self._context = context
        self._is_asked = False

    async def body(self) -> bytes | None:
        """Asks for the body, which comes whole; None where the request has none."""
        self._is_asked = True
        await self._context.write(_ASK_BODY)
        message = await self._context.read()
        if message is grpc.aio.EOF or not message.HasField("request_body"):
            # A request that ends with its headers has no body to send.
            return None
        return bytes(message.request_body.body)

    def part(self, response: Any) -> Any:
        """The part of a response that answers what Envoy said last."""
        return response.request_body if self._is_asked else response.request_headers


def _body_asked() -> Any:
    response = ext_proc.ProcessingResponse()
    # An answer to the headers that changes nothing.
    response.request_headers.response.SetInParent()
    response.mode_override.request_header_mode = processing_mode_pb2.ProcessingMode.SEND
    response.mode_override.response_header_mode = processing_mode_pb2.ProcessingMode.SKIP
    response.mode_override.request_body_mode = processing_mode_pb2.ProcessingMode.BUFFERED
    return response


_ASK_BODY: Final = _body_asked()
