"""Errors cross the wire and come back as what they were."""

import json

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh import errors, status
from helios.mesh.errors import HeliosError


def every_class() -> list[type[HeliosError]]:
    found: list[type[HeliosError]] = []
    queue = [HeliosError]
    while queue:
        for child in queue.pop().__subclasses__():
            if child.__module__ == errors.__name__:
                found.append(child)
                queue.append(child)
    return found


def over_the_wire(error: HeliosError) -> HeliosError:
    trailers = grpc.aio.Metadata(*status.trailing_metadata(error))
    rpc_error = grpc.aio.AioRpcError(grpc.StatusCode[error.grpc_code], grpc.aio.Metadata(), trailers, error.message)
    return status.error_from_rpc(rpc_error)


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_every_error_keeps_class_reason_message_and_metadata(kind: type[HeliosError]) -> None:
    sent = kind("what happened", metadata={"param": "model"}, retry_after_seconds=1.5)
    received = over_the_wire(sent)
    assert type(received) is kind
    assert (received.reason, received.message, received.metadata, received.retry_after_seconds) == (
        sent.reason,
        "what happened",
        {"param": "model"},
        1.5,
    )


@pytest.mark.parametrize("kind", every_class(), ids=lambda kind: kind.__name__)
def test_http_status_is_the_one_that_envoy_gives_the_grpc_code(kind: type[HeliosError]) -> None:
    # Source: grpc_json_transcoder, Grpc::Utility::grpcToHttpStatus.
    transcoded = {
        "INVALID_ARGUMENT": 400,
        "FAILED_PRECONDITION": 400,
        "UNAUTHENTICATED": 401,
        "PERMISSION_DENIED": 403,
        "NOT_FOUND": 404,
        "ALREADY_EXISTS": 409,
        "ABORTED": 409,
        "RESOURCE_EXHAUSTED": 429,
        "UNAVAILABLE": 503,
        "DEADLINE_EXCEEDED": 504,
        "DATA_LOSS": 500,
        "UNIMPLEMENTED": 501,
        "INTERNAL": 500,
    }
    assert kind.http_status == transcoded[kind.grpc_code]


def test_a_reason_of_its_own_does_not_change_the_class() -> None:
    received = over_the_wire(errors.AlreadyExists("taken", reason="ALIAS_TAKEN"))
    assert type(received) is errors.AlreadyExists
    assert received.reason == "ALIAS_TAKEN"


@given(st.text(max_size=3000))
def test_openai_body_is_ascii_json_and_fits_a_header(message: str) -> None:
    body = status.openai_body(errors.InvalidRequest(message, metadata={"param": "max_tokens"}))
    document = json.loads(body.decode("ascii"))["error"]
    assert document["param"] == "max_tokens"
    assert document["type"] == "invalid_request_error"
    assert document["message"] == message or document["message"].endswith("…")
    assert b"\n" not in body
    assert b"\r" not in body


def test_retry_after_is_whole_seconds_rounded_up() -> None:
    trailers = dict(status.trailing_metadata(errors.HoldExpired("later", retry_after_seconds=2.1)))
    assert trailers["retry-after"] == "3"
    assert trailers["x-should-retry"] == "true"
    assert "retry-after" not in dict(status.trailing_metadata(errors.ModelNotFound("no")))


def test_a_status_of_a_stranger_gets_the_general_class_of_its_code() -> None:
    plain = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "reset")
    assert type(status.error_from_rpc(plain)) is errors.Unavailable
