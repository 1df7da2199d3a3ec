"""The one place where errors become wire status, and wire status errors.

gRPC carries ``google.rpc.Status`` with one ``ErrorInfo`` (reason, domain, metadata) and a ``RetryInfo`` where a retry
may help. Two more trailers serve HTTP callers: ``x-openai-error`` is the complete OpenAI error body, which Envoy's
error filter puts out as it is, and ``retry-after`` is what it says. ``x-should-retry`` steers openai's own clients,
which retry 408, 409, 429 and all of 5xx unless told otherwise.
"""

import math
from collections.abc import Iterable
from typing import Any, Final, NoReturn, Protocol

import grpc
import grpc.aio
import orjson
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from helios.mesh import errors
from helios.mesh.errors import HeliosError

ERROR_DOMAIN: Final = "helios"
DETAILS_TRAILER: Final = "grpc-status-details-bin"
OPENAI_ERROR_TRAILER: Final = "x-openai-error"
# HTTP/2 peers commonly bound a header list to 8 KiB, and the message stands in it three times.
_MESSAGE_LIMIT: Final = 1_000

Trailers = tuple[tuple[str, str | bytes], ...]


class AbortContext(Protocol):
    """The part of a servicer context that ``abort`` needs."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Ends the call."""
        ...


def status_from_error(error: HeliosError) -> status_pb2.Status:
    """Returns the wire form of an error, details included."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_code), message=_clip(error.message))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    info.metadata.update({key: _clip(value) for key, value in error.metadata.items()})
    status.details.add().Pack(info)
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromMilliseconds(max(0, round(error.retry_after_seconds * 1000)))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def openai_body(error: HeliosError) -> bytes:
    """Returns OpenAI's error object for an error: ASCII JSON, so that it may travel in a header."""
    code = "model_not_found" if error.reason == "MODEL_NOT_FOUND" else error.reason.lower()
    body = {
        "error": {
            "message": _clip(error.message),
            "type": error.openai_type,
            "param": error.metadata.get("param"),
            "code": code,
        }
    }
    return _to_ascii(orjson.dumps(body))


def retry_after_header(error: HeliosError) -> str | None:
    """Returns the value of Retry-After, whole seconds rounded up and at least 1, or None."""
    if error.retry_after_seconds is None:
        return None
    return str(max(1, math.ceil(error.retry_after_seconds)))


def trailing_metadata(error: HeliosError) -> Trailers:
    """Returns the trailers that carry an error to gRPC and HTTP callers."""
    trailers: list[tuple[str, str | bytes]] = [
        (DETAILS_TRAILER, status_from_error(error).SerializeToString()),
        (OPENAI_ERROR_TRAILER, openai_body(error).decode("ascii")),
        ("x-should-retry", "true" if error.is_retryable else "false"),
    ]
    retry_after = retry_after_header(error)
    if retry_after is not None:
        trailers.append(("retry-after", retry_after))
    return tuple(trailers)


def ending(error: HeliosError) -> tuple[grpc.StatusCode, str, Trailers]:
    """Returns what a call that failed ends with: code, message, trailers."""
    return grpc.StatusCode[error.grpc_code], _clip(error.message), trailing_metadata(error)


async def abort(context: AbortContext, error: HeliosError) -> NoReturn:
    """Ends a call with an error, trailers only where nothing was sent yet."""
    await context.abort(*ending(error))


def error_from_rpc(rpc_error: grpc.aio.AioRpcError) -> HeliosError:
    """Returns the error that a failed call stands for; the class comes from the reason, else from the code."""
    reason: str | None = None
    metadata: dict[str, str] = {}
    retry_after: float | None = None
    for key, value in _items(rpc_error.trailing_metadata()):
        if key == DETAILS_TRAILER and isinstance(value, bytes):
            reason, metadata, retry_after = _read_details(status_pb2.Status.FromString(value))
    kind = _BY_REASON.get(reason or "") or _BY_CODE.get(rpc_error.code().name, errors.Bug)
    return kind(
        rpc_error.details() or kind.__doc__ or reason or "",
        reason=reason,
        metadata=metadata,
        retry_after_seconds=retry_after,
    )


def _read_details(status: status_pb2.Status) -> tuple[str | None, dict[str, str], float | None]:
    reason: str | None = None
    metadata: dict[str, str] = {}
    retry_after: float | None = None
    for detail in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    return reason, metadata, retry_after


def _items(metadata: Any) -> Iterable[tuple[str, str | bytes]]:
    return () if metadata is None else metadata


def _clip(text: str) -> str:
    return text if len(text) <= _MESSAGE_LIMIT else text[: _MESSAGE_LIMIT - 1] + "…"


def _to_ascii(document: bytes) -> bytes:
    return "".join(
        char if ord(char) < 128 else "".join(f"\\u{unit:04x}" for unit in _utf16(char)) for char in document.decode()
    ).encode("ascii")


def _utf16(char: str) -> Iterable[int]:
    encoded = char.encode("utf-16-be")
    return (int.from_bytes(encoded[i : i + 2], "big") for i in range(0, len(encoded), 2))


def _all_classes(root: type[HeliosError]) -> Iterable[type[HeliosError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _all_classes(child)


# A parent comes before its children, so the first class of a code is the general one.
_BY_CODE: dict[str, type[HeliosError]] = {}
_BY_REASON: dict[str, type[HeliosError]] = {}
for _kind in _all_classes(HeliosError):
    if _kind is not HeliosError:
        _BY_CODE.setdefault(_kind.grpc_code, _kind)
        _BY_REASON.setdefault(_kind.default_reason, _kind)
_BY_CODE["CANCELLED"] = errors.Unavailable
