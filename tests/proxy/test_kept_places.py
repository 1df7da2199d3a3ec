"""Places that are kept: low bands never take them, high ones never wait for low ones, and nobody waits for nothing."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.mesh.routing import USUAL_ROUTING, ModelRouting
from helios.proxy import actions
from helios.proxy.admission.keyring import Caller
from helios.proxy.core import Core
from helios.proxy.express.express import Express, Outlook
from helios.proxy.express.lane import ExpressPolicy
from helios.proxy.fleet.state import Load
from helios.proxy.holds import HoldLimits
from helios.proxy.routing.pick import Wishes
from helios.proxy.routing.rules import Rules
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import core, entry, hello, policy, replica

FOUR_PLACES = '{"max_running_requests": 4}'
KEPT = ModelRouting(kept_for_high_ratio=0.25, kept_from_low_ratio=0.25)
LIMITS = {1: 2, 2: 3}
"""Of four places, those that each band may find taken at most, less one."""


def world(count: int = 1, routing: ModelRouting = KEPT, *, model_count: int = 512) -> Core:
    """A core with so many replicas of a model, each of four places."""
    subject = core(policy(holds=HoldLimits(model_count=model_count)))
    one = replace(entry("m", min_replicas=count, engine_settings=FOUR_PLACES), routing=routing)
    subject.models_replaced([one], 0.0, is_synced=True)
    for number in range(count):
        held = replica(f"r{number}", worker_id=f"w{number}", address=f"127.0.0.1:{1000 + number}")
        subject.worker_hello(hello(held.worker_id, replicas=(held,)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def pick(subject: Core, request_id: str, band: int) -> str:
    """The replica that a request of a band is sent to; empty: it has to wait."""
    one = subject.catalogue.get("m")
    assert one is not None
    chosen = subject.pick(one, request_id, 1.0, "", Wishes(band=band))
    return chosen.choices[0].replica_id if chosen is not None else ""


def hold(subject: Core, request_id: str, band: int) -> list[str]:
    """Has a request wait; returns who goes on."""
    return released(held(subject, request_id, band))


def held(subject: Core, request_id: str, band: int) -> list[actions.Action]:
    """Has a request wait; returns what follows."""
    one = subject.catalogue.get("m")
    assert one is not None
    caller = Caller(priority=band)
    _, todo = subject.hold(one, request_id, size_bytes=1, deadline=100.0, now=1.0, caller=caller)
    return todo


def released(todo: Iterable[actions.Action]) -> list[str]:
    return [action.hold.request_id for action in todo if isinstance(action, actions.Release)]


def end(subject: Core, request_id: str) -> list[str]:
    """A request that was picked is over without having begun; returns who goes on for it."""
    return released(subject.load_report([LoadDelta("r0", Load(), finished=((request_id, 0),))], 1.0))


def test_each_band_fills_what_is_not_kept_from_it_and_waits_then() -> None:
    subject = world()
    assert [pick(subject, f"low {number}", 1) for number in range(3)] == ["r0", "r0", ""]
    assert subject.traffic.exclusions("m", 1) == (("r0", "kept_for_higher_bands"),)
    assert subject.traffic.exclusions("m", 2) == ()
    assert [pick(subject, f"normal {number}", 2) for number in range(2)] == ["r0", ""]
    assert subject.traffic.exclusions("m") == (("r0", "kept_for_higher_bands"),)
    assert [pick(subject, f"high {number}", 3) for number in range(9)] == ["r0"] * 9


def test_a_low_band_goes_to_the_replica_that_has_a_place_for_it() -> None:
    subject = world(2)
    for number in range(4):
        assert pick(subject, f"low {number}", 1)
    assert pick(subject, "low 4", 1) == ""
    subject.load_report([LoadDelta("r1", Load(), finished=(("low 1", 0), ("low 3", 0)))], 1.0)
    assert {pick(subject, f"more {number}", 1) for number in range(2)} == {"r1"}


def test_who_waits_for_a_kept_place_holds_up_no_higher_band_and_goes_on_when_there_is_room() -> None:
    subject = world()
    assert [pick(subject, name, 1) for name in ("a", "b")] == ["r0", "r0"]
    assert hold(subject, "low", 1) == []
    # Neither is picked for nobody in front, nor held.
    assert pick(subject, "normal", 2) == "r0"
    assert pick(subject, "high", 3) == "r0"
    assert pick(subject, "low too", 1) == ""
    assert end(subject, "high") == []
    assert end(subject, "normal") == []
    assert end(subject, "a") == ["low"]


def test_a_full_queue_of_a_low_band_does_not_keep_a_higher_one_out() -> None:
    subject = world(model_count=2)
    assert [pick(subject, name, 1) for name in ("a", "b")] == ["r0", "r0"]
    for name in ("c", "d"):
        assert hold(subject, name, 1) == []
    assert pick(subject, "normal", 2) == "r0"
    assert subject.holds.count("m") == 2


def test_a_higher_band_that_waits_goes_before_a_lower_one_whose_turn_it_would_be() -> None:
    subject = world()
    for number in range(2):
        pick(subject, f"low {number}", 1)
    for number in range(9):
        assert hold(subject, f"waits {number}", 1) == []
        # Held, where it comes while the model's own queue is not empty: it goes on at once.
        assert hold(subject, f"high {number}", 3) == [f"high {number}"]


def test_an_engine_in_which_requests_wait_keeps_what_gets_free() -> None:
    subject = world()
    subject.load_report([LoadDelta("r0", Load(running_count=1, waiting_count=1))], 1.0)
    assert [pick(subject, f"of {band}", band) for band in (1, 2, 3)] == ["", "", "r0"]


def test_an_engine_in_which_requests_wait_has_no_place_for_the_lowest_band_where_some_are_kept_from_it_alone() -> None:
    subject = world(routing=ModelRouting(kept_from_low_ratio=0.25))
    subject.load_report([LoadDelta("r0", Load(running_count=1, waiting_count=1))], 1.0)
    assert [pick(subject, f"of {band}", band) for band in (1, 2, 3)] == ["", "r0", "r0"]
    subject.load_report([LoadDelta("r0", Load())], 1.0)
    assert pick(subject, "low", 1) == "r0"


def test_nothing_is_kept_unless_somebody_says_so_nor_once_it_is_taken_back() -> None:
    subject = world(routing=USUAL_ROUTING)
    assert all(pick(subject, f"low {number}", 1) for number in range(9))
    subject = world()
    assert [pick(subject, name, 1) for name in ("a", "b")] == ["r0", "r0"]
    assert hold(subject, "c", 1) == []
    todo = subject.model_upserted(entry("m", min_replicas=1, engine_settings=FOUR_PLACES), 2.0)
    assert released(todo) == ["c"]


def test_a_model_that_keeps_places_is_not_in_the_express_lane() -> None:
    for routing, is_fit in ((USUAL_ROUTING, True), (KEPT, False)):
        subject = world(routing=routing)
        outlook = Outlook(subject.traffic, subject.catalogue, subject.keyring, subject.holds)
        lane = Express(ExpressPolicy(1), outlook, has_past=False)
        assert (lane.place_of("m") is not None) is is_fit


@pytest.mark.parametrize(
    ("high", "low", "places", "limits"),
    [
        (0.0, 0.0, 64, (0, 0)),
        (0.25, 0.0, 64, (48, 48)),
        (0.0, 0.1, 64, (0, 57)),
        (0.7, 0.2, 10, (3, 1)),
        (0.9, 0.09, 2, (1, 1)),
    ],
)
def test_a_share_is_a_whole_number_of_places_and_one_stays(
    high: float, low: float, places: int, limits: tuple[int, int]
) -> None:
    own = ModelRouting(kept_for_high_ratio=high, kept_from_low_ratio=low)
    rules = Rules().of_model(own, places, knows_place=False)
    assert (rules.normal_limit, rules.low_limit) == limits


@given(st.integers(1, 300), st.floats(0, 0.49), st.floats(0, 0.49), st.integers(0, 400), st.booleans())
def test_an_empty_replica_takes_everybody_and_any_takes_the_highest(
    places: int, high: float, low: float, request_count: int, is_full: bool
) -> None:
    own = ModelRouting(kept_for_high_ratio=high, kept_from_low_ratio=low)
    rules = Rules().of_model(own, places, knows_place=False)
    assert rules.lowest_band(0, is_full=False) == 1
    lowest = rules.lowest_band(request_count, is_full=is_full)
    assert lowest <= 3
    # More requests close bands, and never open one.
    assert rules.lowest_band(request_count + 1, is_full=is_full) >= lowest


class KeptPlaces(RuleBasedStateMachine):
    """Requests of all bands come to replicas of four places, wait, begin and end."""

    @initialize(count=st.integers(1, 3))
    def begin(self, count: int) -> None:
        self.core = world(count)
        self.number = 0
        self.running: dict[str, tuple[str, int]] = {}
        self.waiting: dict[str, int] = {}

    @rule(band=st.integers(1, 3))
    def come(self, band: int) -> None:
        self.number += 1
        request_id = f"q{self.number}"
        others = {replica_id for replica_id, _ in self.running.values()}
        replica_id = pick(self.core, request_id, band)
        if replica_id:
            self._runs(request_id, replica_id, band)
            return
        assert band < 3, "a request of the highest band waited"
        assert others, "a request waited though nothing ran"
        self.waiting[request_id] = band
        self._go_on(held(self.core, request_id, band))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.running:
            request_id = data.draw(st.sampled_from(sorted(self.running)))
            replica_id, _ = self.running.pop(request_id)
            delta = LoadDelta(replica_id, Load(), finished=((request_id, 0),))
            self._go_on(self.core.load_report([delta], 1.0))

    def _go_on(self, todo: list[actions.Action]) -> None:
        for action in todo:
            if isinstance(action, actions.Release):
                request_id = action.hold.request_id
                self._runs(request_id, action.pick.choices[0].replica_id, self.waiting.pop(request_id))

    def _runs(self, request_id: str, replica_id: str, band: int) -> None:
        before = sum(one == replica_id for one, _ in self.running.values())
        assert band == 3 or before < LIMITS[band], "a kept place was taken"
        self.running[request_id] = (replica_id, band)

    @invariant()
    def nobody_waits_where_there_is_a_place_for_them(self) -> None:
        if not getattr(self, "waiting", None):
            return
        counts = [
            sum(one == replica.replica_id for one, _ in self.running.values())
            for replica in self.core.fleet.replicas_of("m")
            if self.core.traffic.is_candidate(replica.replica_id)
        ]
        assert all(min(counts) >= LIMITS[band] for band in self.waiting.values())


TestKeptPlaces = KeptPlaces.TestCase
TestKeptPlaces.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
