"""The lane's picker reads and writes protobuf by hand: what it does with answers as any server may write them."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from helios.api.proxy.v1 import lane_service_pb2 as lane_pb
from helios.mesh.names import COHORT_HEADER
from tests.mesh.envoy.lane_gateway import (
    FRAME_BYTES,
    RENEW_SECONDS,
    Gateway,
    address_of,
    answer,
    candidates,
    chat,
    grpc_frame,
)

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
LONG = chat("x" * 2000)
BLOCK_COUNT = 8
# A field of each kind that no version of the contract has, and one within the numbers that bytes of two have.
UNKNOWN = b"".join(
    (b"\xa0\x06\x05", b"\xa1\x06eight...", b"\xa2\x06\x03abc", b"\xa5\x06four", b"\xf8\xff\xff\xff\x0f\x01")
)

full_answers = st.builds(
    lane_pb.RenewResponse,
    lease_milliseconds=st.just(500),
    renew_milliseconds=st.just(125),
    revision=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=200),
    seed=st.integers(0, 2**64 - 1),
    candidates=st.integers(1, 32).flatmap(
        lambda count: st.lists(
            st.builds(
                lane_pb.LaneCandidate,
                fixed_score=st.floats(0, 1),
                running_count=st.integers(0, 2**32 - 1),
                room_plus_one=st.sampled_from([0, 1, 2, 3, 200, 2**32 - 1]),
            ),
            min_size=count,
            max_size=count,
        )
    ),
    retry_count=st.integers(0, 3),
    running_weight=st.floats(0, 1),
    prefix_weight=st.floats(0, 1),
    context_tokens=st.sampled_from([0, 600, 2**32 - 1]),
    tokens_per_byte=st.floats(0, 1),
    losses=st.lists(
        st.builds(
            lane_pb.LaneLoss,
            replica_id=st.sampled_from(["r0", "r1", "nobody"]),
            blocks=st.lists(st.integers(0, 2**53 - 1), max_size=20),
        ),
        max_size=3,
    ),
    loss_sequence=st.integers(0, 2**53),
    forgets_all=st.booleans(),
    session_weight=st.floats(0, 1),
)


@st.composite
def answers(draw: st.DrawFn) -> lane_pb.RenewResponse:
    """Any answer of a proxy."""
    drawn = draw(full_answers)
    for number, candidate in enumerate(drawn.candidates):
        candidate.replica_id, candidate.address = f"r{number}", address_of(number)
    return drawn


def what_comes_of(message: bytes) -> list[object]:
    """What a gateway does that gets such an answer, and another one that has it show what it knows."""
    gateway = Gateway()
    found: list[object] = []
    for _ in range(2):
        _, request = gateway.renewed(grpc_frame(message), LONG)
        assert not request.errors
        found += [request.headers, gateway.send(LONG, x_session_id="s").headers, gateway.send(chat()).headers]
        gateway.sleep(RENEW_SECONDS)
    found.append(gateway.renew(answer()).SerializeToString(deterministic=True))
    return found


def varint(value: int, padding: int = 0) -> bytes:
    """A number, in more bytes than it needs."""
    parts = [value >> shift & 0x7F for shift in range(0, max(7, value.bit_length()), 7)] + [0] * padding
    return bytes(part | 0x80 for part in parts[:-1]) + bytes(parts[-1:])


def fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The fields of a message: number, kind, and what follows the tag; of bytes, without their length."""
    at = 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            part = message[at]
            value, shift, at = value | (part & 0x7F) << shift, shift + 7, at + 1
            if part < 0x80:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == VARINT:
            yield tag >> 3, VARINT, varint(number())
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(tag & 7) or number()
        yield tag >> 3, tag & 7, message[at : at + size]
        at += size


def written(number: int, kind: int, content: bytes, padding: int = 0) -> bytes:
    """A field, its numbers in more bytes than they need."""
    padding = min(padding, MAX_VARINT_BYTES - len(content)) if kind == VARINT else padding
    if kind == VARINT and padding:
        content = bytes([*content[:-1], content[-1] | 0x80, *[0x80] * (padding - 1), 0])
    length = varint(len(content), padding) if kind == BYTES else b""
    return varint(number << 3 | kind, min(padding, 3)) + length + content


@given(message=answers())
def test_what_a_server_may_write_otherwise_reads_the_same(message: lane_pb.RenewResponse) -> None:
    plain = message.SerializeToString(deterministic=True)
    expected = what_comes_of(plain)
    parts = list(fields(plain))
    assert b"".join(written(*part) for part in parts) == plain
    assert what_comes_of(b"".join(written(*part, 3) for part in parts)) == expected, "long numbers"
    strange = b"".join(UNKNOWN + written(*part) for part in parts) + UNKNOWN
    assert what_comes_of(strange) == expected, "unknown fields"
    nested = b"".join(
        written(number, kind, UNKNOWN + content if number in (5, 11) else content) for number, kind, content in parts
    )
    assert what_comes_of(nested) == expected, "unknown fields in messages within"
    assert what_comes_of(b"".join(written(*part) for part in reversed_fields(parts))) == expected, "another order"
    kinds = b"".join(
        written(number, FIXED32, b"four") + written(number, VARINT if kind else BYTES, b"\1")
        for number, kind, _ in parts
    )
    assert what_comes_of(kinds + plain) == expected, "fields of other kinds"


def reversed_fields(parts: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """The last field first; those of one number stay in their order."""
    return sorted(parts, key=lambda part: -part[0])


@given(message=answers())
def test_an_answer_says_what_python_wrote(message: lane_pb.RenewResponse) -> None:
    message.context_tokens, message.prefix_weight, message.session_weight = 0, 0.0, 0.0
    gateway = Gateway()
    _, request = gateway.renewed(message)
    free = [candidate for candidate in message.candidates if candidate.room_plus_one != 1]
    assert request.is_picked == bool(free)
    if not free:
        return
    scores = {c.address: c.fixed_score + message.running_weight / (1 + c.running_count) for c in free}
    ordered = sorted(scores, key=lambda address: -scores[address])
    assert request.endpoints == ordered[: min(message.retry_count, 2) + 1]
    assert request.headers["x-helios-route-revision"] == message.revision
    asked = gateway.told(answer())
    assert asked.loss_sequence == message.loss_sequence
    (pick,) = asked.picks
    assert pick.score == scores[ordered[0]]


def test_absent_fields_are_zero() -> None:
    gateway = Gateway()
    replicas = [lane_pb.LaneCandidate(replica_id=f"r{number}", address=address_of(number)) for number in range(2)]
    message = lane_pb.RenewResponse(lease_milliseconds=500, candidates=replicas)
    asked, request = gateway.renewed(message)
    assert asked == lane_pb.RenewRequest(model="m", now_seconds=gateway.now_seconds)
    assert request.endpoints == [address_of(0)]
    assert request.headers["x-helios-route-revision"] == ""
    assert COHORT_HEADER not in gateway.send(LONG).headers


def test_a_request_without_an_id_is_told_of() -> None:
    gateway = Gateway()
    gateway.renew(answer(0.5), x_request_id="")
    assert gateway.told(answer(0.5)).picks[0].request_id == ""


SAMPLE = answer(
    *[0.5] * 3,
    losses=[lane_pb.LaneLoss(replica_id="r0", blocks=[1, 2**53 - 1]), lane_pb.LaneLoss(replica_id="r1")],
    loss_sequence=300,
    session_weight=0.2,
    context_tokens=4096,
    tokens_per_byte=0.25,
).SerializeToString()


def reads(frame: bytes) -> bool:
    """Whether a gateway that gets this takes it for an answer; where not, that is logged, and nobody is picked for."""
    gateway = Gateway()
    _, request = gateway.renewed(frame)
    assert len(request.errors) in (0, 1)
    if request.errors:
        assert request.errors[0].startswith("lane: an answer can't be read: ")
        assert not request.is_picked
    assert gateway.send(LONG, x_session_id="s").is_picked == request.is_picked
    gateway.sleep(2.0**32)
    asking = gateway.begin(chat())
    asking.answered(answer(0.5))
    assert asking.is_picked
    return not request.errors


def test_an_answer_that_ends_early_is_read_where_python_reads_it() -> None:
    for size in range(len(SAMPLE)):
        part = SAMPLE[:size]
        try:
            lane_pb.RenewResponse.FromString(part)
            is_whole = True
        except DecodeError:
            is_whole = False
        assert reads(grpc_frame(part)) == is_whole, size
        assert not reads(grpc_frame(SAMPLE)[: size + FRAME_BYTES]), "the frame says how long it is"
    assert reads(grpc_frame(SAMPLE))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0\0\0",
        b"\0\0\0\0\1",
        b"\1" + grpc_frame(SAMPLE)[1:],
        grpc_frame(SAMPLE) + b"\0",
        grpc_frame(b"\x08" + b"\x80" * 10 + b"\0"),
        grpc_frame(b"\x0b\x0c"),
        grpc_frame(b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        grpc_frame(answer(candidates=[lane_pb.LaneCandidate(replica_id="r0")]).SerializeToString()),
        grpc_frame(answer(candidates=[lane_pb.LaneCandidate(address="1.2.3.4:5")]).SerializeToString()),
        grpc_frame(b"\x5a\x09\x12\x07seven.."),
        b"<html>502</html>",
    ],
    ids=[
        "nothing",
        "short",
        "shorter than it says",
        "compressed",
        "longer than it says",
        "no end of a number",
        "a group",
        "a vast length",
        "no address",
        "no name",
        "a part of a hash",
        "html",
    ],
)
def test_what_is_no_answer_is_logged(frame: bytes) -> None:
    assert not reads(frame)


@given(data=st.data())
def test_no_bytes_make_it_fail(data: st.DataObject) -> None:
    message = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(0, 6))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    reads(grpc_frame(bytes(message)))
    reads(grpc_frame(data.draw(st.binary(max_size=60))))


def test_an_old_lease_outlives_what_is_no_answer() -> None:
    gateway = Gateway()
    gateway.renew(answer(0.5, 0.4))
    gateway.sleep(RENEW_SECONDS)
    asked, request = gateway.renewed(grpc_frame(SAMPLE[:-1]))
    assert request.errors
    assert request.is_picked
    assert len(asked.picks) == 1
    gateway.sleep(0.25)
    asked = gateway.renew(answer(0.5, 0.4))
    assert (len(asked.picks), asked.untold_count) == (1, 0), "who answers has heard"


@given(
    ids=st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=4, unique=True),
    request_ids=st.lists(st.text(max_size=300), min_size=1, max_size=4),
    running_count=st.integers(0, 1000),
    sequence=st.sampled_from([0, 1, 127, 128, 2**31, 2**32, 2**53]),
    model=st.text(min_size=1, max_size=300),
)
def test_what_is_told_is_what_was_picked(
    ids: list[str], request_ids: list[str], running_count: int, sequence: int, model: str
) -> None:
    gateway = Gateway()
    replicas = candidates(*[0.5] * len(ids), running_count=running_count)
    for replica, replica_id in zip(replicas, ids, strict=True):
        replica.replica_id = replica_id
    message = answer(candidates=replicas, loss_sequence=sequence)
    id_of = {replica.address: replica.replica_id for replica in replicas}
    picked: list[tuple[str, str, int]] = []

    def noted(request: Any, request_id: str, count: int) -> None:
        picked.append((request_id, id_of[request.endpoints[0]], count))

    noted(gateway.renewed(message, model=model, x_request_id=request_ids[0])[1], request_ids[0], 0)
    for request_id in request_ids:
        noted(gateway.send(LONG, model=model, x_request_id=request_id), request_id, BLOCK_COUNT)
    gateway.sleep(RENEW_SECONDS)
    asked = gateway.renew(message, model=model)
    assert asked.model == model
    assert asked.loss_sequence == sequence
    assert [(pick.request_id, pick.replica_id, len(pick.blocks)) for pick in asked.picks] == picked
    assert len({tuple(pick.blocks) for pick in asked.picks if pick.blocks}) == 1
