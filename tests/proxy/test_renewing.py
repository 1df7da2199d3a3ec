"""What a gateway is told to pick by, and tells of its picks: each is noted once, in place of what was made up of it."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import REGISTRY

from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.api.proxy.v1 import lane_service_pb2 as pb
from helios.api.proxy.v1.lane_service_pb2_grpc import LaneServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.xds.state import ExpressRoute
from helios.proxy.core import Core
from helios.proxy.explain.journal import Journal, JournalLimits
from helios.proxy.explain.record import Record, RequestState
from helios.proxy.explain.wire import explanation_to_proto
from helios.proxy.express.express import LEASE_SECONDS
from helios.proxy.fleet.servicer import FleetServicer
from helios.proxy.fleet.state import Load
from helios.proxy.picker.renewing import Renewing
from helios.proxy.routing.corrections import Corrections
from helios.proxy.routing.losses import HASH_END
from helios.proxy.routing.prefix import NO_BLOCKS, Blocks
from helios.proxy.runtime import Runtime
from helios.proxy.traffic import LoadDelta
from tests.proxy.harness import World, small_world
from tests.proxy.support import entry, replica
from tests.proxy.test_lane import in_lane
from tests.proxy.test_runtime import NoEnvoys, SlowDisk

PROMPT = Blocks(tuple(range(100, 110)))


class Proxy:
    """A proxy whose model "m" has two replicas and is in the lane, asked as a gateway asks."""

    def __init__(self, count: int = 2) -> None:
        self.core: Core = in_lane(count)
        self.runtime = Runtime(self.core, publisher=NoEnvoys(), memory=SlowDisk())
        self.fleet = FleetServicer(self.runtime, proxy_id="p", report_interval_seconds=1.0)
        self.renewing = Renewing(self.runtime, own=None)

    def renew(self, *picks: pb.LanePick, model: str = "m", **more: Any) -> pb.RenewResponse:
        """One question of a gateway whose clock is at 1000."""
        usual: dict[str, Any] = {"model": model, "now_seconds": 1000.0, "picks": picks}
        request = pb.RenewRequest(**(usual | more))
        return pb.RenewResponse.FromString(self.renewing.answer(request.SerializeToString(), None))

    def report(self, *started: str, finished: Sequence[str] = (), replica_id: str = "r0", status_code: int = 0) -> None:
        """A replica tells of requests."""
        delta = types_pb2.LoadDelta(replica_id=replica_id)
        for request_id in started:
            delta.started.add(request_id=request_id)
        for request_id in finished:
            ended = delta.finished.add(request_id=request_id, prompt_tokens=5, status_code=status_code)
            ended.duration.FromMilliseconds(5)
        message = fleet_pb.SessionRequest(load=fleet_pb.LoadReport(deltas=[delta]))
        self.fleet.take(message, f"w{replica_id[1:]}", time.monotonic())

    def record(self, request_id: str) -> Record:
        """What is known of a request."""
        found = self.runtime.journal.find(request_id)
        assert found is not None
        return found

    def explained(self, request_id: str) -> str:
        """Why it went where it went."""
        pick = self.record(request_id).pick
        assert pick is not None
        return pick.explain()

    def holds(self, *blocks: int) -> dict[str, int]:
        """Who has a prompt's first blocks."""
        return self.core.traffic._prefixes.match(Blocks(blocks))


def told(request_id: str = "q", replica_id: str = "r0", **more: Any) -> pb.LanePick:
    """A pick of a tenth of a second ago."""
    usual: dict[str, Any] = {"picked_seconds": 999.9, "score": 0.7, "held_count": 5, "blocks": PROMPT}
    return pb.LanePick(request_id=request_id, replica_id=replica_id, **(usual | more))


def express_count() -> float:
    """Requests that came by the lane."""
    return REGISTRY.get_sample_value("helios_picks_total", {"outcome": "express"}) or 0.0


def test_a_lease_is_for_half_a_second_and_names_all_that_a_pick_goes_by() -> None:
    proxy = Proxy()
    proxy.core.load_report([LoadDelta("r0", Load(3, 2, 0.5))], 2.0)
    answer = proxy.renew()
    assert (answer.lease_milliseconds, answer.renew_milliseconds) == (1000 * LEASE_SECONDS, 100)
    assert answer.revision == "sha256:1"
    first, second = answer.candidates
    assert (first.replica_id, first.address, first.running_count) == ("r0", "127.0.0.1:1000", 3)
    assert first.room_plus_one == 3, "two more of four that may wait, and one"
    assert first.fixed_score == pytest.approx(0.5 / 3 + 0.2 * 0.5)
    assert (second.replica_id, second.running_count, second.room_plus_one) == ("r1", 0, 0)
    weights = (answer.running_weight, answer.prefix_weight, answer.session_weight)
    assert weights == (0.3, 0.4, 0.2)
    assert (answer.retry_count, answer.context_tokens, answer.tokens_per_byte) == (2, 0, 0.25)
    assert 0 <= answer.seed < HASH_END
    now = time.monotonic()
    assert proxy.core.express.lane.may_get_requests("r0", now + LEASE_SECONDS)
    assert not proxy.core.express.lane.may_get_requests("r0", now + 2 * LEASE_SECONDS)


def test_a_model_that_is_not_known_or_not_in_the_lane_has_an_answer_of_no_length() -> None:
    proxy = Proxy()
    proxy.core.models_replaced([*proxy.core.catalogue.models(), entry("n")], 2.0, is_synced=True)
    for model in ("", "nobody", "n"):
        message = pb.RenewRequest(model=model, picks=[told()]).SerializeToString()
        assert proxy.renewing.answer(message, None) == b""
    assert proxy.runtime.journal.find("q") is None


def test_hashes_of_another_revision_or_process_begin_with_something_else() -> None:
    proxy, other = Proxy(), Proxy()
    assert proxy.renew().seed == proxy.renew().seed
    assert proxy.renew().seed != other.renew().seed
    assert proxy.renew().seed == proxy.renewing._seed("sha256:1")
    assert proxy.renew().seed != proxy.renewing._seed("sha256:2")


def test_a_pick_that_is_told_of_is_explained_and_counted() -> None:
    proxy, before = Proxy(), express_count()
    proxy.renew(told())
    record = proxy.record("q")
    assert record.state is RequestState.SENT
    assert proxy.explained("q") == "the best of 2, by Envoy's express lane: 0.700 (prefix 0.50)"
    assert (record.model, record.name, record.revision) == ("m", "m", "sha256:1")
    assert time.monotonic() - record.arrived_at == pytest.approx(0.1, abs=0.09)
    pick = explanation_to_proto(record, time.monotonic()).pick
    assert (pick.candidate_count, [candidate.replica_id for candidate in pick.candidates]) == (2, ["r0"])
    assert pick.candidates[0].scores["prefix"] == 0.5
    assert pick.weights["prefix"] == pytest.approx(0.4)
    # Its replica tells of it later, and of its end.
    proxy.report("q")
    proxy.report(finished=["q"])
    assert proxy.record("q").state is RequestState.FINISHED
    assert proxy.explained("q") == "the best of 2, by Envoy's express lane: 0.700 (prefix 0.50)"
    assert express_count() == before + 1


def test_a_session_at_home_is_said_and_weighed() -> None:
    proxy = Proxy()
    proxy.renew(told(is_home=True, held_count=0))
    pick = proxy.record("q").pick
    assert pick is not None
    assert (pick.prefix_weight, pick.session_weight) == (0.0, 0.2)
    assert pick.explain() == "the best of 2, by Envoy's express lane: 0.700 (its session's)"


def test_what_was_made_up_when_its_replica_told_first_gives_way_and_nothing_else() -> None:
    proxy, before = Proxy(), express_count()
    proxy.renew()
    proxy.report("q", finished=["q"])
    assert proxy.explained("q") == "one of 2 replicas, by Envoy's express lane"
    record = proxy.record("q")
    known = {name: getattr(record, name) for name in Record.__slots__ if name != "pick"}
    proxy.renew(told())
    assert proxy.explained("q") == "the best of 2, by Envoy's express lane: 0.700 (prefix 0.50)"
    assert proxy.record("q") is record
    assert {name: getattr(record, name) for name in known} == known
    assert express_count() == before + 1
    # Whoever tells it again is not heard.
    proxy.renew(told(score=0.1, replica_id="r1"))
    assert "0.700" in proxy.explained("q")
    assert express_count() == before + 1


def test_a_request_that_the_picker_had_before_by_the_same_id_is_another_one() -> None:
    proxy = Proxy()
    pick = proxy.core.pick(entry(), "q", time.monotonic())
    assert pick is not None
    proxy.runtime.journal.picked("q", ("m", pick, (), "", 0.0, 0.0))
    proxy.renew(told())
    assert "express lane" in proxy.explained("q")


def test_a_place_is_reserved_for_what_its_replica_has_not_told_of_and_for_nothing_else() -> None:
    proxy = Proxy()
    proxy.renew()
    proxy.report("ended", finished=["ended"])
    proxy.report("runs")
    answer = proxy.renew(told("ended"), told("runs"), told("other", "r1"), told("another", "r1"))
    ledger = proxy.core.traffic.ledger
    assert (ledger.reserved_count("r0"), ledger.reserved_count("r1")) == (0, 2)
    assert [one.running_count for one in answer.candidates] == [0, 2], "the load is the replica's to tell"
    proxy.report("other", finished=["other"], replica_id="r1")
    # Envoy could not connect, and says so before it tells where it sent the request.
    proxy.core.unreached("lost", 2.0, address="", is_failure=False)
    proxy.renew(told("lost"))
    assert (ledger.reserved_count("r0"), ledger.reserved_count("r1")) == (0, 1)


def test_a_retry_that_envoy_made_is_counted_whichever_is_told_of_first() -> None:
    proxy = Proxy()
    retries = proxy.core.traffic.retries
    for _ in range(10):
        retries.retried("m")
    spent = retries._spent["m"]
    proxy.renew(told("1"))
    proxy.report("1", replica_id="r1")
    proxy.report("2", replica_id="r1")
    proxy.renew(told("2"))
    assert retries._spent["m"] == pytest.approx(spent + 2 - 2 * 0.2)
    assert proxy.holds(*PROMPT) == {"r1": len(PROMPT)}, "and the prompt is where it came"


def test_the_prompt_of_a_request_that_its_first_replica_refused_is_where_it_went_on() -> None:
    proxy = Proxy()
    proxy.renew()
    proxy.report("q", finished=["q"], status_code=14)
    proxy.report("q", replica_id="r1")
    proxy.renew(told())
    assert proxy.holds(*PROMPT) == {"r1": len(PROMPT)}
    assert proxy.core.traffic.prompt_of("q") == PROMPT, "it runs there"


def test_of_two_requests_of_one_name_nothing_is_left_when_both_have_ended() -> None:
    proxy = Proxy()
    proxy.renew(told())
    # The record of the first one has given way.
    proxy.runtime.journal = proxy.renewing._journal = Journal(JournalLimits(1, 1))
    proxy.renew(told(replica_id="r1", blocks=PROMPT[:4]))
    traffic = proxy.core.traffic
    assert (traffic.ledger.reserved_count("r0"), traffic.ledger.reserved_count("r1")) == (0, 1)
    assert [one.score for one in traffic.table.snapshot("m", "sha256:1")] == pytest.approx([1.0, 0.85])
    assert traffic._prefixes._held["r0"].sent["q"].has_ended


def test_each_pick_earns_its_model_a_share_of_a_retry() -> None:
    proxy = Proxy()
    for _ in range(12):
        proxy.core.traffic.retries.retried("m")
    assert proxy.renew(told()).retry_count == 0
    assert proxy.renew(*(told(str(number)) for number in range(20))).retry_count == 2


def test_a_prompt_is_known_to_be_at_its_replica_and_takes_no_memory_for_an_end_that_nobody_tells() -> None:
    proxy = Proxy()
    proxy.renew()
    proxy.report("q", finished=["q"])
    proxy.renew(told())
    assert proxy.holds(*PROMPT) == {"r0": len(PROMPT)}
    assert proxy.core.traffic.prompt_of("q") == NO_BLOCKS, "it has ended"
    # What a later prompt has, too, is not remembered by this one.
    proxy.renew(told("p", blocks=PROMPT[:8]))
    sent = proxy.core.traffic._prefixes._held["r0"].sent
    assert {key: len(one.blocks) for key, one in sent.items()} == {"q": 2, "p": 8}
    # Nobody ever tells of that one.
    proxy.core.traffic.tick(time.monotonic() + 60)
    assert proxy.holds(*PROMPT) == {}
    assert sent.keys() == {"q"}


def test_the_prompt_of_a_request_that_runs_is_whole_until_it_ends() -> None:
    proxy = Proxy()
    proxy.renew()
    proxy.report("q")
    proxy.renew(told())
    assert proxy.core.traffic.prompt_of("q") == PROMPT
    proxy.report(finished=["q"])
    assert proxy.core.traffic.prompt_of("q") == NO_BLOCKS


def test_prompts_are_not_learned_where_they_weigh_nothing() -> None:
    proxy = Proxy()
    model = proxy.core.catalogue.get("m")
    assert model is not None
    proxy.core.model_upserted(replace(model, routing=replace(model.routing, prefix_weight=0.0)), 2.0)
    proxy.renew(told())
    assert not proxy.holds(*PROMPT)
    assert proxy.runtime.journal.knows("q")


def test_picks_of_replicas_that_are_not_the_models_are_not_believed() -> None:
    proxy = Proxy()
    stranger = replica("other", model="n", worker_id="w0", address="127.0.0.1:2000")
    proxy.core.replica_event("w0", 1, stranger, 2.0)
    proxy.renew(told("1", "other"), told("2", "nobody"), told("3", ""), told("4"))
    assert [record.request_id for record in proxy.runtime.journal.recent()] == ["4"]
    assert proxy.holds(*PROMPT) == {"r0": len(PROMPT)}


def test_a_pick_of_a_replica_that_is_picked_no_more_is_noted() -> None:
    proxy = Proxy()
    proxy.core.load_report([LoadDelta("r0", Load(), finished=tuple((f"f{n}", 13) for n in range(3)))], 2.0)
    assert not proxy.core.traffic.is_candidate("r0")
    proxy.renew(told())
    assert proxy.explained("q") == "the best of 2, by Envoy's express lane: 0.700 (prefix 0.50)"


def test_what_comes_over_the_wire_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy()
    proxy.renew(told("x" * 64), told("x" * 65), told(""))
    assert [record.request_id for record in proxy.runtime.journal.recent()] == ["x" * 64]
    proxy = Proxy()
    proxy.renew(*(told(str(number)) for number in range(1030)))
    assert proxy.runtime.journal.knows("1023")
    assert not proxy.runtime.journal.knows("1024")
    many = tuple(range(1000, 1500))
    monkeypatch.setattr(Corrections, "room", lambda *_: 1_000_000)
    proxy.renew(told("many", blocks=many))
    assert proxy.holds(*many) == {"r0": 400}
    proxy.renew(told("huge", blocks=[7, HASH_END]), told("largest", blocks=[8, HASH_END - 1]))
    assert not proxy.holds(7)
    assert proxy.holds(8, HASH_END - 1) == {"r0": 2}


@pytest.mark.parametrize(
    ("picked_seconds", "age"),
    [(999.0, 1.0), (1001.0, 0.0), (0.0, 60.0), (-math.inf, 60.0), (math.inf, 0.0), (math.nan, 0.0)],
)
def test_a_pick_was_made_within_the_last_minute_whatever_is_told(picked_seconds: float, age: float) -> None:
    proxy = Proxy()
    proxy.renew(told(picked_seconds=picked_seconds))
    assert time.monotonic() - proxy.record("q").arrived_at == pytest.approx(age, abs=0.5)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"score": 7.0}, (1.0, 0.5)),
        ({"score": -1.0}, (0.0, 0.5)),
        ({"score": math.nan}, (0.0, 0.5)),
        ({"held_count": 4_000_000_000}, (0.7, 1.0)),
        ({"blocks": ()}, (0.7, 0.0)),
    ],
)
def test_scores_lie_between_nothing_and_all_whatever_is_told(
    more: dict[str, Any], expected: tuple[float, float]
) -> None:
    proxy = Proxy()
    proxy.renew(told(**more))
    pick = proxy.record("q").pick
    assert pick is not None
    assert (pick.choices[0].score, pick.choices[0].prefix_score) == expected


def test_losses_are_told_to_who_has_heard_of_those_before() -> None:
    proxy = Proxy()
    first = proxy.renew()
    assert first.loss_sequence > 0
    assert not first.losses
    proxy.renew(told(), told("p", "r1"))
    proxy.core.traffic._prefixes.keep("r0", "q", 0.55)
    answer = proxy.renew(loss_sequence=first.loss_sequence)
    assert {loss.replica_id: set(loss.blocks) for loss in answer.losses} == {"r0": set(PROMPT[5:])}
    assert not answer.forgets_all
    assert not proxy.renew(loss_sequence=answer.loss_sequence).losses
    proxy.core.traffic._prefixes.forget("r1")
    proxy.core.traffic._prefixes.forget("of another model")
    (loss,) = proxy.renew(loss_sequence=answer.loss_sequence).losses
    assert (loss.replica_id, list(loss.blocks)) == ("r1", [])
    # Who knows nothing is told nothing, and who knows too little to forget what it does.
    assert not proxy.renew(loss_sequence=0).losses
    assert not proxy.renew(loss_sequence=0).forgets_all
    assert proxy.renew(loss_sequence=answer.loss_sequence + 99).forgets_all


class NotedEnvoys(NoEnvoys):
    """Notes what the lane is."""

    def __init__(self) -> None:
        self.routes: list[list[ExpressRoute]] = []

    def publish_express(self, routes: Any) -> int:
        self.routes.append(list(routes))
        return len(self.routes)


def test_envoys_are_told_the_models_own_name_and_no_endpoint() -> None:
    subject, envoys = in_lane(), NotedEnvoys()
    Runtime(subject, publisher=envoys, memory=SlowDisk()).apply([])
    assert envoys.routes == [[ExpressRoute("m", None, "sha256:1", "m")]]


@pytest.mark.leaks("Envoy's stand-in keeps connections to servers of this process until it is gone")
async def test_the_picker_serves_it_to_gateways_alone(world: World) -> None:
    world.registry.put("m")
    async with small_world(world) as (proxy, _, _):
        target = proxy.picker_address
        async with Dialer(target, identity=world.identity("edge"), peer="proxy") as dialer:
            answer = await dialer.stub(LaneServiceStub).Renew(pb.RenewRequest(model="m"), timeout=10)
            assert answer == pb.RenewResponse()
        async with Dialer(target, identity=world.identity("worker"), peer="proxy") as dialer:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await dialer.stub(LaneServiceStub).Renew(pb.RenewRequest(model="m"), timeout=10)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
