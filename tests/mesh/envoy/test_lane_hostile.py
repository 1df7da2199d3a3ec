"""Bodies that are made to cost much, or are no JSON at all: each is looked at once, from its beginning to its end."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mesh.envoy.lane_gateway import Gateway, answer

SIZE = 100_000
# Of steps as many as a body has bytes there are milliseconds; of their square, minutes.
LOOK_SECONDS = 1.0
PARTS = (
    b'"max_',
    b'"max_tokens"',
    b'"max_completion_tokens" ',
    b'"max_tokens":1,',
    b'"max_tokens":',
    b'"max_tokens',
    b"max_tokens",
    b'"messages"',
    b'"messages":[',
    b'"tools"',
    b'"tools":[',
    b'"cache_sal',
    b'"user"',
    b'"user" ',
    b'"user":1,',
    b'"prompt_cache_key"',
    b'"',
    b"\\",
    b'\\"',
    b" ",
    b"\n",
    b"a",
    b"_",
    b"1",
    b"9",
    b"-",
    b"e",
    b".",
    b"[",
    b'{"":',
    b"\0",
    b"\xff",
    b"%",
    "\u00e9\U0001f600".encode(),
)


@pytest.fixture(scope="module")
def gateway() -> Gateway:
    """One that looks at all that it can: context, prompt, session."""
    gateway = Gateway()
    gateway.renew(
        answer(
            0.5,
            0.4,
            context_tokens=10_000_000,
            tokens_per_byte=1.0,
            session_weight=0.2,
            lease_milliseconds=2**32 - 1,
            renew_milliseconds=2**32 - 1,
        )
    )
    return gateway


def seconds_for(gateway: Gateway, body: bytes) -> float:
    """How long such a request takes."""
    began = time.perf_counter()
    request = gateway.begin(body)
    seconds = time.perf_counter() - began
    if request.waits_for:
        request.answered(None, status="503")
    assert not request.errors
    return seconds


def test_no_repetition_costs_more_than_its_length(gateway: Gateway) -> None:
    repeated = [one + other for one in PARTS for other in PARTS]
    bodies = [part * (SIZE // len(part)) for part in repeated]
    bodies += [
        begin + part * (SIZE // len(part)) for begin in (b'"messages":', b'"max_tokens"', b'"user"') for part in PARTS
    ]
    seconds, slowest = max((seconds_for(gateway, body), body[:60]) for body in bodies)
    assert seconds < LOOK_SECONDS, slowest


@given(parts=st.lists(st.sampled_from(PARTS) | st.binary(max_size=20), max_size=40))
def test_whatever_comes_is_picked_for_or_left(parts: list[bytes]) -> None:
    gateway = Gateway()
    gateway.renew(answer(0.5, 0.4, context_tokens=1000, tokens_per_byte=0.25, session_weight=0.2))
    body = b"".join(parts)
    request = gateway.send(body)
    assert request.is_picked
    assert not request.errors
