"""The language of the control socket, and the spec that travels in it."""

import json
import struct
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import Corrupted, InvalidRequest
from helios.worker.launcher.messages import Decoder, Exited, Fork, Forked, Message, Ready, Refused, encode
from helios.worker.replica.spec import Placement, ReplicaSpec

SPEC = ReplicaSpec(
    replica_id="r",
    model="m",
    served_names=("alias", "m"),
    revision="sha256:0",
    model_path="/models/m",
    created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    placement=Placement((1, 3)),
)
MESSAGES: list[Message] = [
    Fork(1, json.loads(json.dumps(SPEC.to_document())), 5),
    Ready(1.5, 4),
    Forked(1, 77, 12),
    Refused(2, "no memory: ü"),
    Exited(77, 12, -9),
]


@given(st.lists(st.sampled_from(MESSAGES), max_size=6), st.lists(st.integers(1, 200), min_size=1))
def test_messages_survive_any_cutting_of_the_stream(messages: list[Message], cuts: list[int]) -> None:
    stream = b"".join(map(encode, messages))
    decoder, position, turn = Decoder(), 0, 0
    received: list[Message] = []
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        received += decoder.feed(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert received == messages


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("!I", 1 << 30),
        struct.pack("!I", 2) + b"{}",
        struct.pack("!I", 3) + b"[1]",
        struct.pack("!I", 1) + b"x",
    ],
)
def test_what_is_not_a_message_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupted):
        list(Decoder().feed(data))


def test_a_spec_survives_json() -> None:
    assert ReplicaSpec.from_document(json.loads(json.dumps(SPEC.to_document()))) == SPEC
    assert SPEC.names == ("m", "alias")


@pytest.mark.parametrize("change", [{"created_at": "yesterday"}, {"surprise": 1}, {"placement": None}])
def test_what_is_not_a_spec_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        ReplicaSpec.from_document(SPEC.to_document() | change)
