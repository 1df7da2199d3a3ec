"""What the picker reads from requests."""

from typing import Any

import pytest
from google.api import httpbody_pb2
from hypothesis import given
from hypothesis import strategies as st

from helios.api.inference.v1 import inference_service_pb2 as inference_pb
from helios.mesh.errors import InvalidRequest, ModelMismatch, Unsupported
from helios.mesh.names import PICKER_HEADERS
from helios.proxy.picker.request import agree, read_body, read_heads, timeout_seconds

OPENAI = "/helios.api.inference.v1.OpenAIService/CreateCompletion"
TOKENIZE = "/helios.api.inference.v1.InferenceService/Tokenize"


class Asked(dict[str, str]):
    """Headers that note which of them are looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return default


def test_envoy_sends_the_picker_the_headers_that_it_reads_and_no_others() -> None:
    asked = Asked()
    read_heads(asked)
    assert asked.names == set(PICKER_HEADERS)


def frame(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


@given(st.binary(max_size=200), st.sampled_from([OPENAI, TOKENIZE, TOKENIZE + "x"]))
def test_no_body_breaks_the_reader(body: bytes, path: str) -> None:
    for message in (body, frame(body)):
        try:
            assert read_body(path, message).model
        except (InvalidRequest, Unsupported):
            continue


@given(st.text(min_size=1, max_size=50).filter(lambda text: text.isprintable()))
def test_the_model_of_every_message_is_found(model: str) -> None:
    messages = {
        "Chat": inference_pb.ChatRequest(model=model),
        "Complete": inference_pb.CompleteRequest(model=model, text="x"),
        "Tokenize": inference_pb.TokenizeRequest(model=model, text="x"),
    }
    for name, message in messages.items():
        path = f"/helios.api.inference.v1.InferenceService/{name}"
        assert read_body(path, frame(message.SerializeToString())).model == model


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "application/json; charset=utf-8", "application/x+json"]
)
def test_json_is_read_whatever_it_calls_itself(content_type: str) -> None:
    http = httpbody_pb2.HttpBody(content_type=content_type, data=b'{"model":"m"}')
    assert read_body(OPENAI, frame(http.SerializeToString())).model == "m"


def test_a_compressed_message_asks_for_the_header() -> None:
    with pytest.raises(InvalidRequest, match="x-helios-model"):
        read_body(TOKENIZE, b"\1\0\0\0\0")


def test_header_and_body_must_agree() -> None:
    assert agree("m", "") == agree("", "m") == agree("m", "m") == "m"
    assert agree("", "") == ""
    with pytest.raises(ModelMismatch):
        agree("m", "n")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1S", 1.0), ("250m", 0.25), ("2H", 7200.0), ("", None), ("x", None), ("-1S", None), ("1", None)],
)
def test_grpc_timeouts(text: str, seconds: float | None) -> None:
    assert timeout_seconds(text) == seconds


@pytest.mark.parametrize("length", ["", "x", "-1", "1e3", "²"])
def test_a_content_length_that_is_no_number_counts_as_0(length: str) -> None:
    assert read_heads({"content-length": length}).body_bytes == 0
