"""The lane's picker in Envoy: when it picks, when it asks, what it tells, and what it sets."""

from typing import Any

import pytest

from helios.api.proxy.v1 import lane_service_pb2 as lane_pb
from helios.mesh.names import COHORT_HEADER, ENDPOINT_HEADER, LANE_HEADER, MAX_RETRIES_HEADER, ROUTE_REVISION_HEADER
from tests.mesh.envoy.lane_gateway import (
    LEASE_SECONDS,
    PATIENCE_SECONDS,
    RENEW_SECONDS,
    Gateway,
    Request,
    address_of,
    answer,
    candidates,
    chat,
)

# Picks that wait to be told (lane.lua) and their blocks, and models that are remembered.
MAX_PICKS = 512
MAX_TOLD_BLOCKS = 8192
MAX_MODELS = 32


@pytest.fixture
def gateway() -> Gateway:
    """A gateway that knows nothing yet."""
    return Gateway()


def leased(*scores: float, **more: Any) -> Gateway:
    """A gateway that was told how to pick."""
    gateway = Gateway()
    gateway.renew(answer(*scores, **more))
    return gateway


def test_nothing_is_picked_before_the_first_answer(gateway: Gateway) -> None:
    asking = gateway.begin(chat())
    assert asking.waits_for == "answer"
    assert not gateway.send().is_picked
    asking.answered(answer(0.9, 0.4))
    assert asking.endpoints == [address_of(0), address_of(1)]
    assert gateway.send().is_picked


def test_a_lease_lasts_from_when_it_was_asked_for(gateway: Gateway) -> None:
    asking = gateway.begin(chat())
    gateway.sleep(0.2)
    asking.answered(answer(0.9, 0.4, renew_milliseconds=10_000))
    assert asking.is_picked
    gateway.sleep(0.299)
    assert gateway.send().is_picked
    gateway.sleep(0.001)
    assert not gateway.send().is_picked


def test_a_lease_that_is_over_when_it_comes_is_none(gateway: Gateway) -> None:
    asking = gateway.begin(chat())
    gateway.sleep(0.2)
    asking.answered(answer(0.9, 0.4, lease_milliseconds=200))
    assert not asking.is_picked


@pytest.mark.parametrize(
    "nothing",
    [
        lane_pb.RenewResponse(renew_milliseconds=100),
        answer(renew_milliseconds=100),
        answer(*[0.5] * 33),
        answer(0.5, 0.5, lease_milliseconds=0),
    ],
    ids=["empty", "nobody", "too many", "no lease"],
)
def test_an_answer_that_lets_nothing_be_picked_ends_the_lease(nothing: lane_pb.RenewResponse) -> None:
    gateway = leased(0.5, 0.5)
    gateway.sleep(RENEW_SECONDS)
    _, request = gateway.renewed(nothing)
    assert not request.is_picked
    assert not gateway.send().is_picked
    gateway.sleep(RENEW_SECONDS)
    assert gateway.renewed(answer(0.5, 0.5))[1].is_picked


def test_an_answer_that_does_not_say_when_to_ask_again_has_not_every_request_ask(gateway: Gateway) -> None:
    gateway.renew(b"\0\0\0\0\0")
    assert not gateway.send().is_picked
    gateway.sleep(PATIENCE_SECONDS)
    assert gateway.begin(chat()).waits_for == "answer"


def test_one_request_asks_and_others_go_by_the_old_lease() -> None:
    gateway = leased(0.9, 0.4)
    gateway.sleep(RENEW_SECONDS)
    asking = gateway.begin(chat())
    assert asking.waits_for == "answer"
    assert gateway.send().endpoints == [address_of(0), address_of(1)]
    asking.answered(answer(0.4, 0.9))
    assert asking.endpoints[0] == address_of(1)


@pytest.mark.parametrize(("body", "status"), [(None, "503"), (None, "200"), (b"\0\0\0\0\0", "504")])
def test_a_renewal_that_fails_leaves_the_old_lease(body: bytes | None, status: str) -> None:
    gateway = leased(0.9, 0.4)
    gateway.sleep(RENEW_SECONDS)
    asking = gateway.begin(chat())
    asking.answered(body, status=status)
    assert asking.is_picked
    assert gateway.send().is_picked, "the next request does not ask at once"
    gateway.sleep(PATIENCE_SECONDS)
    asking = gateway.begin(chat())
    gateway.sleep(LEASE_SECONDS - RENEW_SECONDS - PATIENCE_SECONDS)
    asking.answered(body, status=status)
    assert not asking.is_picked


def test_a_request_whose_client_left_while_it_asked_stops_nobody_for_long() -> None:
    gateway = leased(0.9, 0.4)
    told = gateway.send()
    gateway.sleep(RENEW_SECONDS)
    assert gateway.begin(chat()).waits_for == "answer"
    gateway.sleep(PATIENCE_SECONDS - 0.001)
    assert gateway.send().is_picked
    gateway.sleep(0.001)
    asked = gateway.renew(answer(0.9, 0.4))
    assert [pick.replica_id for pick in asked.picks] == ["r0"]
    assert asked.untold_count == 2, "the lost call told of them, or did not"
    assert told.is_picked


def test_an_answer_that_comes_after_the_next_request_asked_changes_nothing() -> None:
    gateway = leased(0.9, 0.4)
    gateway.sleep(RENEW_SECONDS)
    late = gateway.begin(chat())
    gateway.sleep(PATIENCE_SECONDS)
    asking = gateway.begin(chat())
    assert asking.asked.untold_count == 1
    late.answered(answer(0.4, 0.9))
    assert late.endpoints[0] == address_of(0)
    assert gateway.send().is_picked, "somebody still asks"
    asking.answered(answer(0.9, 0.4))
    gateway.sleep(RENEW_SECONDS)
    assert gateway.renew(answer(0.9, 0.4)).untold_count == 0


def test_a_request_leaves_before_its_body_comes_and_others_go_on(gateway: Gateway) -> None:
    # Bodies of the lane are whole by then, as a rule: the transcoder has waited for them.
    waiting = Request(gateway, chat(), {LANE_HEADER: "m"}, {})
    assert waiting.waits_for == "body"
    gateway.renew(answer(0.5, 0.5))
    assert gateway.send().is_picked
    gateway.sleep(LEASE_SECONDS)
    waiting.body_comes()
    assert waiting.waits_for == "answer", "the clock was read after its body came"


def test_requests_without_a_body_are_picked_for(gateway: Gateway) -> None:
    asking = gateway.begin(None)
    asking.answered(answer(0.9, 0.4))
    assert asking.endpoints == [address_of(0), address_of(1)]


def test_each_model_has_a_lease_of_its_own(gateway: Gateway) -> None:
    gateway.renew(answer(0.9, 0.4, revision="one"), model="one")
    asked = gateway.renew(answer(0.4, 0.9, revision="two"), model="two")
    assert asked.model == "two"
    assert not asked.picks
    one, two = gateway.send(model="one"), gateway.send(model="two")
    assert [r.headers[ROUTE_REVISION_HEADER] for r in (one, two)] == ["one", "two"]
    assert [r.endpoints[0] for r in (one, two)] == [address_of(0), address_of(1)]


def test_of_too_many_models_the_one_asked_about_longest_ago_is_forgotten(gateway: Gateway) -> None:
    for number in range(MAX_MODELS):
        gateway.renew(answer(0.9, 0.4, renew_milliseconds=50), model=f"m{number}")
        gateway.sleep(0.001)
    gateway.sleep(0.05)
    gateway.renew(answer(0.9, 0.4), model="m0")
    gateway.renew(answer(0.9, 0.4), model="another")
    assert gateway.send(model="m0").is_picked
    assert gateway.begin(chat(), model="m1").waits_for == "answer"
    assert gateway.send(model="another").is_picked


@pytest.mark.parametrize(
    ("retries", "count", "places"), [(0, 3, [0]), (1, 3, [0, 1]), (2, 3, [0, 1, 2]), (9, 4, [0, 1, 2]), (2, 2, [0, 1])]
)
def test_as_many_endpoints_are_named_as_may_be_tried(retries: int, count: int, places: list[int]) -> None:
    gateway = leased(*[0.5 - number / 100 for number in range(count)], retry_count=retries, running_weight=0)
    request = gateway.send()
    assert request.endpoints == [address_of(place) for place in places]
    assert request.headers[MAX_RETRIES_HEADER] == str(len(places) - 1)


def test_what_was_set_before_is_replaced() -> None:
    gateway = leased(0.5)
    before = {ENDPOINT_HEADER: "1.2.3.4:5", MAX_RETRIES_HEADER: "7", COHORT_HEADER: "0", ROUTE_REVISION_HEADER: "x"}
    headers = gateway.send(chat("x" * 2000), **before).headers
    assert headers[ENDPOINT_HEADER] == address_of(0)
    assert headers[MAX_RETRIES_HEADER] == "0"
    assert headers[ROUTE_REVISION_HEADER] == "sha256:1"
    assert headers[COHORT_HEADER] != "0"


def test_equal_replicas_get_as_many_requests() -> None:
    gateway = leased(*[0.5] * 4)
    firsts = [gateway.send().endpoints[0] for _ in range(39)]
    assert [firsts.count(address_of(number)) for number in range(4)] == [9, 10, 10, 10]


def test_own_picks_count_until_they_are_told() -> None:
    gateway = leased(0.5, 0.48, running_weight=0.2)
    # Its first request, which is the renewal's, takes 0.1 off a replica's score.
    assert gateway.send().endpoints[0] == address_of(1)
    gateway.sleep(RENEW_SECONDS)
    asking = gateway.begin(chat())
    assert [pick.replica_id for pick in asking.asked.picks] == ["r0", "r1"]
    assert [gateway.send().endpoints[0] for _ in range(2)] == [address_of(0), address_of(1)]
    # A proxy counts what it was told of: here, of both nothing runs any more, and a request of each is not told.
    asking.answered(answer(0.5, 0.48, running_weight=0.2))
    assert asking.endpoints[0] == address_of(0)
    assert gateway.send().endpoints[0] == address_of(1)


def test_what_is_picked_while_one_asks_counts_after_its_answer() -> None:
    gateway = leased(0.5, 0.5)
    gateway.sleep(RENEW_SECONDS)
    asking = gateway.begin(chat())
    assert gateway.send().endpoints[0] == address_of(1)
    asking.answered(answer(0.5, 0.5))
    assert asking.endpoints[0] == address_of(0)
    assert gateway.send().endpoints[0] == address_of(0), "each was sent one that no proxy was told of"
    assert gateway.send().endpoints[0] == address_of(1)


def test_own_picks_count_while_nobody_hears_of_them() -> None:
    gateway = leased(0.5, 0.5, lease_milliseconds=2000)
    gateway.sleep(RENEW_SECONDS)
    gateway.begin(chat()).answered(None, status="503")
    sent = [gateway.send().endpoints[0] for _ in range(6)]
    assert sent.count(address_of(0)) == sent.count(address_of(1)) == 3
    gateway.sleep(PATIENCE_SECONDS)
    asking = gateway.begin(chat())
    assert len(asking.asked.picks) == 7
    gateway.send()
    asking.answered(answer(0.5, 0.5))
    assert asking.endpoints[0] == address_of(1), "only one was sent since"


def test_room_is_used_up_and_then_a_proxy_is_asked() -> None:
    offered = answer()
    offered.candidates.extend(candidates(0.5, 0.1))
    offered.candidates[0].room_plus_one, offered.candidates[1].room_plus_one = 3, 2
    gateway = Gateway()
    _, first = gateway.renewed(offered)
    found = [first, *(gateway.send() for _ in range(4))]
    assert [request.endpoints for request in found] == [
        [address_of(0), address_of(1)],
        [address_of(0), address_of(1)],
        [address_of(1)],
        [],
        [],
    ]
    gateway.sleep(RENEW_SECONDS)
    offered.candidates[0].room_plus_one = 1
    asked, request = gateway.renewed(offered)
    assert len(asked.picks) == 3
    assert asked.untold_count == 0
    assert request.endpoints == [address_of(1)], "of what it was told, the proxy says what room it left"
    offered.candidates[0].room_plus_one = 0
    gateway.sleep(RENEW_SECONDS)
    gateway.renew(offered)
    assert all(gateway.send().is_picked for _ in range(100)), "any number"


def test_room_is_less_by_what_was_sent_while_a_proxy_was_asked() -> None:
    gateway = leased(0.5)
    gateway.sleep(RENEW_SECONDS)
    asking = gateway.begin(chat())
    assert gateway.send().is_picked
    offered = answer(0.5)
    offered.candidates[0].room_plus_one = 3
    asking.answered(offered)
    assert asking.is_picked
    assert not gateway.send().is_picked


def test_a_candidate_without_room_is_passed_over() -> None:
    offered = answer(0.9, 0.5, 0.4)
    offered.candidates[0].room_plus_one = 1
    gateway = Gateway()
    assert gateway.renewed(offered)[1].endpoints == [address_of(1), address_of(2)]


CONTEXT = 1000


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        (b"", True),
        (b',"max_tokens":100', True),
        (b',"max_tokens" : 10000', False),
        (b',"max_completion_tokens":10000', False),
        (b',"max_completion_tokens":10,"max_tokens":10000', False),
        (b',"max_tokens":10,"max_completion_tokens":\n\t10000', False),
        (b',"max_tokens":1e4', False),
        (b',"max_\\u0074okens":10000', False),
        (b',"max_tokens":-10000', True),
        (b',"max_tokens":null', True),
        (b',"max_tokens":true', True),
        (b',"max_tokens":"10000"', True),
        (b',"metadata":{"max_tokens":10000}', True),
        (b',"x":"' + b"x" * 3900 + b'"', False),
    ],
)
def test_what_may_be_too_long_is_left_to_a_proxy(more: bytes, *, fits: bool) -> None:
    gateway = leased(0.5, context_tokens=CONTEXT, tokens_per_byte=0.25)
    body = chat()[:-1] + more + b"}"
    assert gateway.send(body).is_picked == fits
    assert leased(0.5, tokens_per_byte=0.25).send(body).is_picked


def test_the_limit_is_the_whole_body_and_answer() -> None:
    gateway = leased(0.5, context_tokens=CONTEXT, tokens_per_byte=0.0)
    bodies = [b'{"messages":[],"max_tokens":%d}' % count for count in (CONTEXT - 2, CONTEXT - 1)]
    assert [gateway.send(body).is_picked for body in bodies] == [True, False]


def test_what_makes_equal_prompts_different_is_left_to_a_proxy() -> None:
    gateway = leased(0.5)
    assert not gateway.send(chat()[:-1] + b',"cache_salt":"s"}').is_picked
    assert not gateway.send(b'{"tools":[],"cache_salt":"s",' + chat()[1:]).is_picked
    assert gateway.send(b'{"tools":[],' + chat()[1:]).is_picked
    assert gateway.send(chat()[:-1] + b',"tools":[]}').is_picked
    assert gateway.send(chat('\\"tools\\" \\"cache_salt\\"')).is_picked


def test_picks_are_told_as_they_were() -> None:
    gateway = leased(0.5, 0.4, running_weight=0.25)
    gateway.sleep(0.01)
    gateway.send(chat(), x_request_id="an id")
    gateway.send(chat(), x_request_id="x" * 300)
    asked = gateway.told(answer(0.5, 0.4))
    assert asked.now_seconds == pytest.approx(1000.135, abs=1e-6)
    assert [(pick.request_id, pick.replica_id) for pick in asked.picks] == [
        ("id-1", "r0"),
        ("an id", "r1"),
        ("x" * 300, "r0"),
    ]
    assert [pick.score for pick in asked.picks] == pytest.approx([0.75, 0.65, 0.625])
    assert [pick.picked_seconds for pick in asked.picks] == pytest.approx([1000.0, 1000.01, 1000.01], abs=1e-6)
    assert not any(pick.held_count or pick.blocks or pick.is_home for pick in asked.picks)


def test_more_picks_than_can_be_kept_are_counted_and_soon_told() -> None:
    gateway = leased(0.5, 0.5)
    for _ in range(MAX_PICKS - 2):
        gateway.send()
    assert gateway.send().is_picked
    # So many has the next one ask, whenever it was to be; the ones that come meanwhile wait for the one after it.
    asking = gateway.begin(chat())
    assert len(asking.asked.picks) == MAX_PICKS
    for _ in range(MAX_PICKS + 5):
        assert gateway.send().is_picked
    asking.answered(answer(0.5, 0.5))
    asked = gateway.told(answer(0.5, 0.5))
    assert len(asked.picks) == MAX_PICKS
    assert asked.untold_count == 5 + 1
    asked = gateway.told(answer(0.5, 0.5))
    assert (len(asked.picks), asked.untold_count) == (1, 0)


def test_blocks_that_wait_to_be_told_are_bounded() -> None:
    gateway = leased(0.5)
    body = chat("x" * 99_000)
    asking = gateway.begin(body)
    count = 0
    while not asking.waits_for:
        asking, count = gateway.begin(body), count + 1
    told = sum(len(pick.blocks) for pick in asking.asked.picks)
    assert MAX_TOLD_BLOCKS <= told < MAX_TOLD_BLOCKS + 400
    for _ in range(count + 5):
        assert gateway.send(body).is_picked
    asking.answered(answer(0.5))
    asked = gateway.told(answer(0.5))
    assert (len(asked.picks), asked.untold_count) == (count, 6)
