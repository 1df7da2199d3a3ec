"""What the lane's picker knows of prompts: their hashes, who has them, and what it forgets."""

import itertools
import random
import string
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.api.proxy.v1 import lane_service_pb2 as lane_pb
from helios.mesh.names import COHORT_HEADER
from tests.mesh.envoy.lane_gateway import RENEW_SECONDS, Gateway, address_of, answer, candidates, chat, framed

BLOCK_BYTES, MAX_BLOCKS = 256, 400
# Blocks of which it is known who has them (lane.lua); as many older ones are, too.
MAX_KNOWN = 65_536
BEGINNING = b'"messages":'
WIDE = 1 << 64


def hashes(*bodies: bytes, seed: int = 7) -> list[list[int]]:
    """The hashes of the bodies' blocks, as they are told."""
    gateway, said = Gateway(), answer(0.5, seed=seed)
    gateway.renew(said, b"")
    told = [pick for body in bodies for pick in gateway.carry(body, said).picks]
    told += gateway.told(said).picks
    assert len(told) == 1 + len(bodies)
    return [list(pick.blocks) for pick in told[1:]]


def prompt(text: bytes) -> bytes:
    """A body whose prompt is this, whole blocks of it."""
    assert text.startswith(BEGINNING)
    return b"{" + text


def padded(text: bytes, count: int) -> bytes:
    """So many blocks that begin with a text."""
    return (BEGINNING + text).ljust(count * BLOCK_BYTES, b" ")


def reference(text: bytes, seed: int) -> list[int]:
    """The hashes as lane.lua's comments have them, by Python's integers."""
    state, multipliers = seed, []
    for _ in range(65):
        state = (state + 0x9E3779B97F4A7C15) % WIDE
        value = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % WIDE
        value = (value ^ value >> 27) * 0x94D049BB133111EB % WIDE
        multipliers.append(value ^ value >> 31)
    multipliers[64] |= 1
    found, value = [], seed
    for begin, end in pairwise(range(0, len(text) // BLOCK_BYTES * BLOCK_BYTES + 1, BLOCK_BYTES)):
        block = text[begin:end]
        words = [int.from_bytes(block[at : at + 4], "little") for at in range(0, BLOCK_BYTES, 4)]
        value = (value * multipliers[64] + sum(map(int.__mul__, words, multipliers))) % WIDE
        found.append(value >> 11)
    return found


@given(text=st.binary(max_size=3000), seed=st.integers(0, WIDE - 1), before=st.text(string.ascii_letters, max_size=9))
def test_hashes_are_what_their_rule_says(text: bytes, seed: int, before: str) -> None:
    body = b'{"model":"' + before.encode() + b'",' + BEGINNING + text
    (found,) = hashes(body, seed=seed)
    prompt_text = framed(body)[framed(body).index(b'"messages"') :]
    if b'"tools"' in text or b'"cache_salt"' in text:
        return
    expected = reference(prompt_text, seed)
    assert found == (expected if len(expected) > 1 else [])


@given(data=st.data(), count=st.integers(2, 20))
def test_a_change_anywhere_changes_all_hashes_from_there_on_and_none_before(data: st.DataObject, count: int) -> None:
    text = bytearray(padded(data.draw(st.binary(max_size=200)), count))
    other = bytearray(text)
    at = data.draw(st.integers(len(BEGINNING), len(text) - 1))
    other[at] ^= data.draw(st.integers(1, 255))
    one, another = hashes(prompt(bytes(text)), prompt(bytes(other)))
    assert len(one) == len(another) == count
    place = at // BLOCK_BYTES
    assert one[:place] == another[:place]
    assert not {*one[place:]} & {*another}


def test_the_seed_changes_all_hashes() -> None:
    bodies = [prompt(padded(text, 80)) for text in (b"hello", b"hallo")]
    found = [one for seed in range(20) for blocks in hashes(*bodies, seed=seed) for one in blocks]
    assert len(set(found)) == 20 * 2 * 80


def test_a_hundred_thousand_blocks_do_not_collide() -> None:
    drawn = random.Random(1)
    count = 390
    bodies = [prompt(BEGINNING + drawn.randbytes(count * BLOCK_BYTES)) for _ in range(200)]
    near = [prompt(padded(b"%d" % number, 50)) for number in range(500)]
    found = [one for blocks in hashes(*bodies, *near) for one in blocks]
    assert len(found) == 200 * count + 500 * 50
    assert len(set(found)) == len(found)
    assert max(found) < 1 << 53
    # Both halves are used: a table of Lua's goes by them.
    assert len({one >> 32 for one in found}) > 60_000
    assert len({one & 0xFFFFFFFF for one in found}) > len(found) - 10


def test_bits_that_a_client_changes_in_pairs_do_not_cancel() -> None:
    """What multiplication by a known number lets through unchanged: the highest bits of words, and of neighbours."""
    text = padded(b"", 2)
    words = range(16, BLOCK_BYTES, 12)
    places = [8 * at + bit for at in words for bit in (2, 7, 26, 31)]
    changed = {text}
    for pair in itertools.combinations(places, 2):
        other = bytearray(text)
        for place in pair:
            other[place // 8] ^= 1 << place % 8
        changed.add(bytes(other))
    found = hashes(*map(prompt, changed))
    assert len({blocks[0] for blocks in found}) == len({blocks[1] for blocks in found}) == len(changed)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (2 * BLOCK_BYTES - 1, 0),
        (2 * BLOCK_BYTES, 2),
        (3 * BLOCK_BYTES - 1, 2),
        (MAX_BLOCKS * BLOCK_BYTES, MAX_BLOCKS),
        ((MAX_BLOCKS + 1) * BLOCK_BYTES, MAX_BLOCKS),
        (200_000, MAX_BLOCKS),
    ],
)
def test_whole_blocks_count_from_two_to_a_bound(size: int, count: int) -> None:
    (found,) = hashes(prompt(padded(b"", 1).ljust(size, b"x")))
    assert len(found) == count


def test_the_prompt_begins_where_it_is_named_first() -> None:
    rest = b"x" * 600
    bodies = [
        b'{"model":"m","messages":' + rest,
        b'{"model":"another","temperature":0.5,"messages":' + rest,
        b'{"model":"m","prompt":' + rest,
        b'{"model":"other","prompt":' + rest,
        b'{"tools":[1],"messages":' + rest,
        b'{"model":"other","tools":[1],"messages":' + rest,
        b'{"tools":[2],"messages":' + rest,
        b'{"model":"m","input":' + rest,
        b'{"model":"m","x":"\\"messages\\"","prompt":' + rest,
    ]
    found = hashes(*bodies)
    one, also_one, two, also_two, tools, also_tools, other_tools, none, prompt_again = found
    assert one == also_one
    assert two == also_two == prompt_again
    assert tools == also_tools
    assert len({tuple(blocks[:1]) for blocks in (one, two, tools, other_tools)}) == 4
    assert none == []


def test_tools_behind_messages_are_before_them_as_in_templates() -> None:
    messages, more, tools = b'"messages":[' + b"m" * 900, b"n" * 600, b',"tools":[' + b"t" * 600 + b"]}"
    bodies = [
        b'{"model":"m",' + messages + b"]" + tools,
        b'{"model":"another",' + messages + more + b"]" + tools,
        b'{"model":"m",' + messages + b"]" + tools.replace(b"t" * 600, b"u" * 600),
        b'{"model":"m",' + messages + b"]}",
    ]
    first, longer, others, without = hashes(*bodies)
    assert len(first) * BLOCK_BYTES > 600 + 600, "the tools, and most of what both say"
    assert longer[: len(first)] == first
    assert len(longer) > len(first)
    assert len({first[0], others[0], without[0]}) == 3
    assert not set(first) & set(others)


def test_the_cohort_is_what_prompts_have_in_common() -> None:
    gateway = Gateway()
    gateway.renew(answer(0.5))
    common = b"c" * 4 * BLOCK_BYTES
    bodies = [common + b"one" * 200, common + b"two" * 200, b"d" + common, b"e" * 600]
    cohorts = [gateway.send(prompt(BEGINNING + body)).headers.get(COHORT_HEADER) for body in bodies]
    assert cohorts[0] == cohorts[1] != cohorts[2]
    assert cohorts[2] is not None
    assert cohorts[3] is None, "it has no four blocks"
    told = gateway.told(answer(0.5)).picks
    assert cohorts[0] == f"{told[1].blocks[3]:x}"


A, B, C = (chat(letter * 2000) for letter in "abc")
BLOCK_COUNT = len(A) // BLOCK_BYTES


def learned(*scores: float, **more: object) -> Gateway:
    """A gateway that sent A to the first and B to the second of its replicas, and was told of the sending."""
    gateway = Gateway()
    gateway.renew(answer(1.0, 0.0, **more), A)
    gateway.sleep(RENEW_SECONDS)
    gateway.renew(answer(0.0, 1.0, **more), B)
    gateway.sleep(1.0)
    gateway.renew(answer(*scores or (0.5, 0.5), **more), b"")
    return gateway


def first(gateway: Gateway, body: bytes) -> str:
    """Where a request goes first."""
    return gateway.send(body).endpoints[0]


def held(gateway: Gateway, *bodies: bytes) -> list[tuple[str, int]]:
    """Where requests go, and how much is known of their prompts there."""
    gateway.sleep(1.0)
    gateway.renew(answer(0.5, 0.4, running_weight=0), b"")
    for body in bodies:
        gateway.send(body)
    return [(pick.replica_id, pick.held_count) for pick in gateway.told(answer(0.5, 0.5)).picks[-len(bodies) :]]


def test_prompts_go_to_whom_their_beginnings_were_sent() -> None:
    assert held(learned(), A, B, C) == [("r0", BLOCK_COUNT), ("r1", BLOCK_COUNT), ("r0", 0)]
    longer = chat("a" * 1700 + "b" * 1700)
    assert held(learned(), longer)[0] == ("r0", 6)


def test_load_outweighs_a_prompt_as_the_weight_says() -> None:
    assert first(learned(0.5, 0.9, running_weight=0), A) == address_of(0)
    assert first(learned(0.0, 1.0, prefix_weight=0.49, running_weight=0), A) == address_of(1)
    assert first(learned(0.6, 0.5, prefix_weight=0.0, running_weight=0), B) == address_of(0)


def test_a_prompt_is_not_known_by_a_request_that_was_not_picked_for() -> None:
    full = answer(0.5)
    full.candidates[0].room_plus_one = 1
    gateway = Gateway()
    assert not gateway.renewed(full, A)[1].is_picked
    assert held(gateway, A) == [("r0", 0)]


def lost(gateway: Gateway, *losses: lane_pb.LaneLoss, **more: object) -> Gateway:
    """The same gateway after it was told of losses."""
    gateway.sleep(RENEW_SECONDS)
    gateway.renew(answer(0.5, 0.5, losses=losses, **more), b"")
    return gateway


def test_losses_are_believed() -> None:
    gateway = learned()
    (blocks,) = {tuple(one) for one in hashes(A, seed=answer().seed)}
    lost(gateway, lane_pb.LaneLoss(replica_id="r1", blocks=blocks), lane_pb.LaneLoss(replica_id="nobody"))
    assert held(gateway, A, B) == [("r0", BLOCK_COUNT), ("r1", BLOCK_COUNT)]
    lost(gateway, lane_pb.LaneLoss(replica_id="r0", blocks=[1, 2, *blocks[5:6]]))
    assert held(gateway, A) == [("r0", 5)], "what comes after is of no use, and was not lost"
    assert held(gateway, A) == [("r0", BLOCK_COUNT)]
    lost(gateway, lane_pb.LaneLoss(replica_id="r0", blocks=blocks[:1]))
    assert held(gateway, A)[0][1] == 0
    lost(gateway, lane_pb.LaneLoss(replica_id="r1"))
    assert held(gateway, B, A) == [("r0", 0), ("r0", BLOCK_COUNT)]
    lost(gateway, forgets_all=True)
    assert held(gateway, A) == [("r0", 0)]


def test_losses_are_believed_of_what_was_not_used_for_long() -> None:
    gateway = learned()
    drawn = random.Random(4)
    for _ in range(MAX_KNOWN // 390 + 2):
        gateway.carry(prompt(BEGINNING + drawn.randbytes(390 * BLOCK_BYTES)), answer(0.5, 0.5))
    (blocks,) = hashes(A, seed=answer().seed)
    lost(gateway, lane_pb.LaneLoss(replica_id="r0", blocks=blocks[4:]))
    assert held(gateway, A, B) == [("r0", 4), ("r1", BLOCK_COUNT)]


@pytest.mark.parametrize("change", [{"seed": 5}, {"revision": "sha256:2"}])
def test_another_seed_or_revision_begins_anew(change: dict[str, object]) -> None:
    gateway = learned()
    gateway.sleep(RENEW_SECONDS)
    changed = answer(0.5, 0.4, running_weight=0, **change)
    gateway.renew(changed, b"")
    assert first(gateway, B) == address_of(0)
    (pick,) = gateway.told(changed).picks[1:]
    text = framed(B)
    assert pick.blocks == reference(text[text.index(b'"messages"') :], changed.seed)


def test_what_is_known_outlives_a_time_without_a_lease() -> None:
    gateway = learned()
    gateway.sleep(60)
    assert not gateway.renewed(lane_pb.RenewResponse(renew_milliseconds=100))[1].is_picked
    gateway.sleep(60)
    assert gateway.renewed(answer(0.5, 0.5), B)[1].endpoints[0] == address_of(1)


def test_nothing_is_believed_of_a_newcomer() -> None:
    """Nor of one that left and is back: it may have been started anew."""
    gateway = learned()
    one, other, newcomer = candidates(0.5, 0.5, 0.5)
    for replicas in ([newcomer, one], [other, newcomer]):
        gateway.sleep(RENEW_SECONDS)
        gateway.renew(answer(candidates=replicas, running_weight=0), b"")
        gateway.send(A)
        gateway.send(B)
    told = gateway.told(answer()).picks
    assert [(pick.replica_id, pick.held_count) for pick in told[1:]] == [("r1", 0), ("r2", BLOCK_COUNT)]


def test_thirty_two_replicas_have_each_their_own() -> None:
    gateway = Gateway()
    bodies = [chat(letter * 2000) for letter in (string.ascii_letters + string.digits)[:32]]
    for number, body in enumerate(bodies):
        gateway.renew(answer(*[float(place == number) for place in range(32)]), body)
        gateway.sleep(RENEW_SECONDS)
    gateway.sleep(1.0)
    gateway.renew(answer(*[0.5] * 32), b"")
    for number, body in enumerate(bodies):
        assert first(gateway, body) == address_of(number)


def test_of_many_prompts_those_in_use_are_remembered_in_bounded_memory() -> None:
    gateway = Gateway()
    drawn = random.Random(3)
    forgotten = prompt(BEGINNING + drawn.randbytes(2000))
    used = 0
    for number in range(5 * MAX_KNOWN // 390):
        body = prompt(BEGINNING + drawn.randbytes(390 * BLOCK_BYTES)) if number else forgotten
        gateway.carry(A if number % 100 == 1 else body, answer(0.5))
        used = max(used, gateway.memory_bytes if number % 300 == 299 else 0)
    assert held(gateway, A, forgotten) == [("r0", BLOCK_COUNT), ("r0", 0)]
    assert 4 << 20 < used < 16 << 20
