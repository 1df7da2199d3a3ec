"""Reading request bodies."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import InvalidRequest
from helios.worker.replica.body import parse_body

JSON = "application/json"


def test_a_plain_body_is_returned_as_it_is() -> None:
    assert parse_body("application/json; charset=utf-8", b'{"model": "m", "n": 1}') == {"model": "m", "n": 1}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"a"}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"\\u006d\\u006F\\u0064\\u0065\\u006C":"a","model":"b"}',
        b'{"model" : "a", "x": {"model": "c"}, "model"\n: "b"}',
    ],
)
def test_two_models_are_refused_however_they_are_spelled(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(JSON, body)
    assert caught.value.reason == "DUPLICATE_MODEL"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","messages":[{"model":"b"},{"model":"c"}]}',
        b'{"messages":[{"model":"b"}],"model":"a","text":"\\"model\\": \\"x\\", \\"model\\": 1"}',
        b'{"model":"a","metadata":{"model":"b"}}',
    ],
)
def test_models_of_inner_objects_and_texts_do_not_count(body: bytes) -> None:
    assert parse_body(JSON, body)["model"] == "a"


@pytest.mark.parametrize(
    ("content_type", "body", "words"),
    [
        (JSON, b'{"model":', "not valid JSON"),
        (JSON, b'{"model":"a"} x', "not valid JSON"),
        (JSON, b'{"model":NaN}', "not valid JSON"),
        (JSON, b'{"model":"\xff"}', "not valid JSON"),
        (JSON, b"", "not valid JSON"),
        (JSON, b'["model"]', "must be a JSON object"),
        (JSON, b"{}", "model: required"),
        (JSON, b'{"model":null}', "model: required"),
        (JSON, b'{"model":["a"]}', "model: required"),
        ("", b'{"model":"a"}', "content type"),
        ("application/x-www-form-urlencoded", b"model=a", "content type"),
    ],
)
def test_what_is_not_a_request_is_refused_and_said_why(content_type: str, body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_body(content_type, body)


def test_a_body_nested_to_the_parsers_limit_does_not_crash() -> None:
    deep = b"[" * 1020 + b"]" * 1020
    body = b'{"model":"a","model":"b","x":' + deep + b"}"
    with pytest.raises(InvalidRequest):
        parse_body(JSON, body)


keys = st.sampled_from(["model", "models", "Model", "mode", "x"])


@given(st.lists(st.tuples(keys, st.sampled_from(["a", "b"]), st.booleans()), max_size=6))
def test_refuses_exactly_the_bodies_with_two_models(pairs: list[tuple[str, str, bool]]) -> None:
    def spell(key: str, is_escaped: bool) -> str:
        return "".join(f"\\u{ord(char):04x}" for char in key) if is_escaped else key

    body = "{" + ",".join(f'"{spell(key, escaped)}":"{value}"' for key, value, escaped in pairs) + "}"
    count = sum(key == "model" for key, _, _ in pairs)
    assert orjson.loads(body) == json.loads(body)
    if count == 1:
        assert parse_body(JSON, body.encode())["model"] == {key: value for key, value, _ in pairs}["model"]
    else:
        with pytest.raises(InvalidRequest) as caught:
            parse_body(JSON, body.encode())
        assert caught.value.reason == ("DUPLICATE_MODEL" if count else "INVALID_REQUEST")
