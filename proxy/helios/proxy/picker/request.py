"""What the picker reads from a request: a pure reading of headers, metadata and, where it must be, the body."""

import re
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import orjson
from google.api import httpbody_pb2
from google.protobuf.message import DecodeError, Message

from helios.api.inference.v1 import inference_service_pb2 as inference_pb
from helios.mesh import names
from helios.mesh.errors import InvalidRequest, ModelMismatch, Unsupported
from helios.proxy.catalogue import shown
from helios.proxy.picker.prompt import Prompt, native_prompt, openai_prompt

OPENAI_PREFIX: Final = "/helios.api.inference.v1.OpenAIService/"
INFERENCE_PREFIX: Final = "/helios.api.inference.v1.InferenceService/"
# Above it, parsing takes more than a millisecond and leaves the event loop.
INLINE_BODY_BYTES: Final = 256 << 10
FRAME_BYTES: Final = 5
"""What is before a gRPC message: whether it is compressed, and its length."""
_MISSING: Final = "you must provide a model parameter"
PROMPT_PATHS: Final = frozenset(
    (
        f"{OPENAI_PREFIX}CreateChatCompletion",
        f"{OPENAI_PREFIX}CreateCompletion",
        f"{INFERENCE_PREFIX}Chat",
        f"{INFERENCE_PREFIX}Complete",
    )
)
"""Calls whose prompt an engine may have in its cache."""
_INFERENCE_MESSAGES: Final[dict[str, type[Message]]] = {
    "Chat": inference_pb.ChatRequest,
    "Complete": inference_pb.CompleteRequest,
    "Tokenize": inference_pb.TokenizeRequest,
}
_TIMEOUT: Final = re.compile(r"(\d{1,8})([HMSmun])")
_TIMEOUT_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


@dataclass(frozen=True, slots=True)
class Heads:
    """The headers that matter, empty where absent."""

    path: str
    request_id: str
    model: str
    body_bytes: int
    timeout: str
    traceparent: str
    session: str = ""
    durable: str = ""
    tier: str = ""
    authorization: str = field(default="", repr=False)
    """Holds a secret: never to be logged, nor kept for longer than the request."""


class Body(NamedTuple):
    """What the picker reads of a body."""

    model: str
    prompt: Prompt
    tier: object = None
    """OpenAI's `service_tier`, whatever it is; None: it says nothing."""


def read_heads(headers: dict[str, str]) -> Heads:
    """Picks out what matters; a length that is no number counts as 0.

    Envoy's transcoder takes content-length off: what the client said of it is in a header of the mesh's own.
    """
    length = headers.get(names.BODY_BYTES_HEADER) or headers.get("content-length", "0")
    return Heads(
        path=headers.get(":path", ""),
        request_id=headers.get("x-request-id", ""),
        model=headers.get("x-helios-model", ""),
        body_bytes=int(length) if length.isascii() and length.isdigit() else 0,
        timeout=headers.get("grpc-timeout", ""),
        traceparent=headers.get("traceparent", ""),
        session=headers.get(names.SESSION_HEADER, ""),
        durable=headers.get(names.DURABLE_HEADER, ""),
        tier=headers.get(names.TIER_HEADER, ""),
        authorization=headers.get("authorization", ""),
    )


def agree(header_model: str, body_model: str) -> str:
    """The model that header and body name; empty where neither does. Raises ModelMismatch where they differ."""
    if header_model and body_model and header_model != body_model:
        raise ModelMismatch(
            f"the header x-helios-model names '{shown(header_model)}' and the body names '{shown(body_model)}'",
            metadata={"param": "model"},
        )
    return header_model or body_model


def read_body(path: str, body: bytes) -> Body:
    """Reads a request's body: one gRPC frame, as Envoy has it after transcoding.

    Raises:
        InvalidRequest: it is malformed, of the wrong content type, or names no model.
    """
    message = _unframe(body)
    if path.startswith(INFERENCE_PREFIX):
        kind = _INFERENCE_MESSAGES.get(path.removeprefix(INFERENCE_PREFIX))
        if kind is None:
            raise Unsupported(f"no such method: {shown(path)}")
        try:
            request = kind.FromString(message)
        except DecodeError as error:
            raise InvalidRequest("the request message can't be parsed") from error
        if not (model := getattr(request, "model", "")):
            raise _missing()
        return Body(str(model), native_prompt(request))
    document = _openai_document(message)
    return Body(_openai_model(document), openai_prompt(document), document.get(names.TIER_FIELD))


def missing_model() -> InvalidRequest:
    """The answer to a request that names no model."""
    return _missing()


def timeout_seconds(text: str) -> float | None:
    """Reads a `grpc-timeout` header; None where there is none or it is malformed."""
    match = _TIMEOUT.fullmatch(text)
    return int(match[1]) * _TIMEOUT_UNITS[match[2]] if match else None


def _unframe(body: bytes) -> bytes:
    if len(body) < FRAME_BYTES:
        raise _missing()
    if body[0] != 0:
        raise InvalidRequest("a compressed request needs the metadata x-helios-model", metadata={"param": "model"})
    if int.from_bytes(body[1:FRAME_BYTES], "big") != len(body) - FRAME_BYTES:
        raise InvalidRequest("the request is not exactly one gRPC message")
    return body[FRAME_BYTES:]


def _openai_document(message: bytes) -> dict[str, Any]:
    try:
        http = httpbody_pb2.HttpBody.FromString(message)
    except DecodeError as error:
        raise InvalidRequest("the request message can't be parsed") from error
    kind = http.content_type.partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(
            f"the content type must be application/json, not '{shown(kind)}'",
            reason="UNSUPPORTED_CONTENT_TYPE",
            metadata={"param": "content-type"},
        )
    try:
        document = orjson.loads(http.data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", reason="MALFORMED_JSON") from error
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object", reason="MALFORMED_JSON")
    return document


def _openai_model(document: dict[str, Any]) -> str:
    model = document.get("model")
    if model is None or model == "":
        raise _missing()
    if not isinstance(model, str):
        raise InvalidRequest("the model parameter must be a string", metadata={"param": "model"})
    return model


def _missing() -> InvalidRequest:
    return InvalidRequest(_MISSING, metadata={"param": "model"})
