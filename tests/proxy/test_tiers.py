"""A request's own band of priority: at most what its key allows, refused in OpenAI's words where it is none."""

from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given as over
from hypothesis import strategies as st

from helios.mesh.errors import InvalidRequest
from helios.mesh.names import PRIORITY_HEADER, TIER_FIELD
from helios.proxy.admission.history import History
from helios.proxy.admission.keyring import ANYBODY, Caller
from helios.proxy.admission.tiers import given
from helios.proxy.core import Core
from helios.proxy.picker.gate import Gate
from helios.proxy.picker.hints import hint_headers
from helios.proxy.picker.prompt import NO_PROMPT
from helios.proxy.picker.request import Body, read_body, read_heads
from helios.proxy.routing.prefix import NO_BLOCKS
from tests.proxy.support import core

TIERS = ("auto", "default", "flex", "priority", "scale")
CALLERS = st.sampled_from([ANYBODY, *(Caller(key_id="k", priority=band) for band in (1, 2, 3))])


@over(CALLERS, st.sampled_from(TIERS), st.booleans())
def test_nobody_is_given_more_than_is_allowed_or_than_was_asked_for(caller: Caller, asked: str, is_free: bool) -> None:
    after, tier = given(caller, asked, is_free=is_free)
    ceiling = 3 if is_free and not caller.key_id else caller.priority
    assert after.priority <= ceiling
    assert tier == {1: "flex", 2: "default", 3: "priority"}[after.priority]
    if asked == "flex":
        assert after.priority == 1
    if asked == "auto":
        assert after is caller
    if asked == "default":
        assert after.priority == min(2, ceiling)
    if asked in ("priority", "scale"):
        assert after.priority == ceiling
    # Nothing else about who asks is another thing now.
    assert {**after.as_fields(), "priority": 0} == {**caller.as_fields(), "priority": 0}


@pytest.mark.parametrize(
    ("asked", "reason", "words"),
    [
        ("fast", "INVALID_VALUE", "Invalid value: 'fast'. Supported values are: 'auto'"),
        ("", "INVALID_VALUE", "Invalid value: ''"),
        ("Flex", "INVALID_VALUE", "Invalid value: 'Flex'"),
        (True, "INVALID_TYPE", "got a boolean"),
        (1.0, "INVALID_TYPE", "got a number"),
        (["flex"], "INVALID_TYPE", "got an array"),
        ({"tier": "flex"}, "INVALID_TYPE", "got an object"),
    ],
)
def test_what_is_no_tier_is_refused_by_name(asked: object, reason: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        given(ANYBODY, asked, is_free=True)
    assert (refused.value.reason, refused.value.metadata["param"]) == (reason, "service_tier")


def ranked(subject: Core, *, header: str = "", body: object = None, lifted: Any = None) -> Gate:
    """A request's gate once it was ranked."""
    gate = Gate(subject, read_heads({"x-service-tier": header, "x-request-id": "q"} if header else {}))
    document = Struct()
    document["model"] = "m"
    if lifted is not None:
        document[TIER_FIELD] = lifted
    gate.rank(document.fields, Body("m", NO_PROMPT, body) if body is not None else None)
    return gate


def test_the_body_says_it_before_the_header_however_it_was_read() -> None:
    subject = core()
    for gate in (
        ranked(subject, header="flex"),
        ranked(subject, lifted="flex"),
        ranked(subject, body="flex"),
        ranked(subject, header="default", lifted="flex"),
        ranked(subject, header="default", body="flex"),
    ):
        assert gate.caller.priority == 1
        assert gate.left_for_answer() == {"x-helios-service-tier": "flex"}
    silent = ranked(subject)
    assert silent.caller is ANYBODY
    assert silent.left_for_answer() == {}
    for wrong in (3, "fast", True):
        with pytest.raises(InvalidRequest):
            ranked(subject, lifted=wrong)


def test_null_says_nothing() -> None:
    document = Struct()
    document.update({"model": "m", TIER_FIELD: None})
    gate = Gate(core(), read_heads({}))
    gate.rank(document.fields, None)
    assert gate.left_for_answer() == {}


def test_a_body_that_was_asked_for_is_read_alike() -> None:
    data = b'{"model":"m","service_tier":"flex","prompt":"x"}'
    http = b"\x12" + bytes([len(data)]) + data
    frame = b"\0" + len(http).to_bytes(4, "big") + http
    assert read_body("/helios.api.inference.v1.OpenAIService/CreateCompletion", frame).tier == "flex"


def test_engines_are_told_of_a_band_without_a_key() -> None:
    flex, _ = given(ANYBODY, "flex", is_free=False)
    assert hint_headers(flex, "m", NO_BLOCKS, History()) == {PRIORITY_HEADER: "1"}
    assert hint_headers(ANYBODY, "m", NO_BLOCKS, History()) == {}
