"""A model's policy has its replicas chosen: weights go before the proxy's, and what is explained is what counted."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helios.mesh.routing import KEPT, LOAD_WEIGHTS, NAMES, USUAL_ROUTING, Choice, ModelRouting
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.fleet.state import Load
from helios.proxy.routing.pick import Affinity, Wishes, pick
from helios.proxy.routing.prefix import blocks_of
from helios.proxy.routing.rules import Rules, Weights
from helios.proxy.routing.table import Locality
from helios.proxy.settings import RoutingSettings
from helios.proxy.traffic import LoadDelta, RoutingPolicy
from tests.proxy.support import core, entry, hello, policy, replica

PROMPT = blocks_of(b"You are terse. " * 100, "")
WEIGHT = st.none() | st.floats(0, 1)
ROUTINGS = st.builds(
    ModelRouting,
    **dict.fromkeys((*LOAD_WEIGHTS, "prefix_weight", "session_weight", "locality_weight", *KEPT), WEIGHT),
    choice=st.sampled_from((None, *Choice)),
).filter(lambda routing: not routing.problem())
"""All that a policy may say: two that are right each may ask for more than there is together."""


def model(name: str, routing: ModelRouting, **fields: Any) -> ModelEntry:
    """A model with two replicas and a policy."""
    return replace(entry(name, min_replicas=2), routing=routing, **fields)


def fleet(*models: ModelEntry, routing: RoutingPolicy | None = None) -> Core:
    """A core with two replicas of each model, each on a worker and a node of its own."""
    subject = core(replace(policy(), routing=routing or RoutingPolicy()))
    subject.models_replaced(models, 0.0, is_synced=True)
    for number, name in enumerate(one.name for one in models for _ in range(2)):
        held = replica(f"{name}{number % 2}", model=name, worker_id=f"w{number}", address=f"127.0.0.1:{1000 + number}")
        subject.worker_hello(replace(hello(held.worker_id, replicas=(held,)), node=f"n{number % 2}"), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def first(subject: Core, name: str, wishes: Wishes = Wishes()) -> str:  # noqa: B008 (immutable)
    """The replica that a request is sent to, which is over at once."""
    one = subject.catalogue.get(name)
    assert one is not None
    chosen = subject.pick(one, "q", 1.0, "", wishes)
    assert chosen is not None
    best = chosen.choices[0].replica_id
    load = subject.fleet.replica(best)
    assert load is not None
    subject.load_report([LoadDelta(best, load.load, started=("q",), finished=(("q", 0),))], 1.0)
    return best


def test_models_weigh_the_same_load_each_by_its_own_policy() -> None:
    subject = fleet(
        model("a", USUAL_ROUTING), model("k", ModelRouting(kv_weight=1.0, queue_weight=0.0, running_weight=0.0))
    )
    for name in ("a", "k"):
        # The first one computes something and has an empty cache, the second one has a full cache.
        subject.load_report([LoadDelta(f"{name}0", Load(running_count=9)), LoadDelta(f"{name}1", Load(0, 0, 0.9))], 1.0)
    assert first(subject, "a") == "a1"
    assert first(subject, "k") == "k0"


def test_a_policy_counts_from_the_moment_it_is_told_and_until_it_is_taken_back() -> None:
    subject = fleet(model("m", USUAL_ROUTING))
    subject.load_report([LoadDelta("m0", Load(running_count=9)), LoadDelta("m1", Load(0, 0, 0.9))], 1.0)
    assert first(subject, "m") == "m1"
    subject.model_upserted(model("m", ModelRouting(0.0, 0.0, 1.0)), 2.0)
    assert first(subject, "m") == "m0"
    subject.models_replaced([model("m", USUAL_ROUTING)], 3.0, is_synced=True)
    assert first(subject, "m") == "m1"
    subject.model_deleted("m", 4.0)
    assert subject.traffic.rules_of("m") == Rules(Weights())


def test_a_model_that_does_not_care_for_prompts_is_not_asked_for_them() -> None:
    subject = fleet(model("a", USUAL_ROUTING), model("n", ModelRouting(prefix_weight=0.0)))
    assert subject.traffic.wants_prompt(subject.catalogue.models()[0])
    assert not subject.traffic.wants_prompt(subject.catalogue.models()[1])


@pytest.mark.parametrize(("weight", "expected"), [(None, "m1"), (0.05, "m0")])
def test_a_cached_prompt_weighs_what_its_model_says(weight: float | None, expected: str) -> None:
    one = model("m", ModelRouting(prefix_weight=weight))
    subject = fleet(one)
    subject.traffic.prompt_sent(one, "m1", "before", PROMPT)
    subject.load_report([LoadDelta("m1", Load(running_count=1))], 1.0)
    assert first(subject, "m", Wishes(PROMPT)) == expected


def test_sessions_are_not_told_apart_where_a_policy_says_so() -> None:
    for weight, has_home in ((None, True), (0.0, False)):
        one = model("m", ModelRouting(session_weight=weight))
        subject = fleet(one)
        for number in range(20):
            chosen = subject.pick(one, "q", 1.0, "", Wishes(session=f"talk {number}"))
            assert chosen is not None
            assert any(candidate.session_score for candidate in chosen.considered) is has_home


def test_nearness_weighs_what_its_model_says_where_the_gateway_knows_its_place() -> None:
    near = model("m", ModelRouting(locality_weight=0.9))
    for locality, expected in ((Locality(node="n1"), "m1"), (Locality(), "m0")):
        subject = fleet(near, routing=RoutingPolicy(Rules(Weights(locality=0.0)), locality=locality))
        subject.load_report([LoadDelta("m1", Load(running_count=3))], 1.0)
        assert first(subject, "m") == expected


def test_each_model_draws_or_not_as_its_policy_says() -> None:
    drawn = model("d", ModelRouting(choice=Choice.POWER_OF_TWO), min_replicas=3)
    subject = fleet(
        drawn, model("b", USUAL_ROUTING, min_replicas=3), routing=RoutingPolicy(draw=random.Random(1).randrange)
    )
    for name, extra in (("d", "w8"), ("b", "w9")):
        held = replica(f"{name}2", model=name, worker_id=extra, address=f"127.0.0.1:90{extra[1]}0")
        subject.worker_hello(hello(extra, replicas=(held,)), 1.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 1.0)
    # Of three equals the first is always the best; of two that are drawn it is at times not there.
    assert {first(subject, "b") for _ in range(20)} == {"b0"}
    assert len({first(subject, "d") for _ in range(50)}) > 1


@given(ROUTINGS, ROUTINGS, st.booleans())
@example(ModelRouting(prefix_weight=0.5), ModelRouting(session_weight=0.9), False)
@example(ModelRouting(kept_from_low_ratio=0.5), ModelRouting(kept_for_high_ratio=0.9), False)
@example(ModelRouting(kept_for_high_ratio=0.5), ModelRouting(kept_from_low_ratio=0.9), False)
def test_whatever_is_said_what_scorers_weigh_adds_up(own: ModelRouting, usual: ModelRouting, knows_place: bool) -> None:
    rules = Rules().of_model(usual, 0, knows_place=True).of_model(own, 0, knows_place=knows_place)
    weights = rules.weights
    assert weights.queue + weights.running + weights.kv == pytest.approx(1)
    assert all(0 <= getattr(weights, name) <= 1 for name in Weights.__slots__)
    assert weights.prefix + weights.session <= 1 + 1e-9
    assert rules.kept_for_high_ratio + rules.kept_from_low_ratio <= 1 + 1e-9
    assert knows_place or not weights.locality
    for prefix, session in ((0.0, 0.0), (weights.prefix, weights.session)):
        assert sum(weights.shares(prefix, session).values()) == pytest.approx(1)
    said = {name: getattr(own, name) for name in ("prefix_weight", "session_weight")}
    assert said["prefix_weight"] in (None, weights.prefix)
    assert said["session_weight"] in (None, weights.session)


@given(
    ROUTINGS,
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 1)), min_size=2, max_size=8),
    st.data(),
)
def test_an_explained_score_is_its_scorers_by_their_weights(
    own: ModelRouting, loads: list[tuple[int, int, float]], data: st.DataObject
) -> None:
    subject = fleet(model("m", own), routing=RoutingPolicy(locality=Locality(node="n1")))
    for number, load in enumerate(loads[:2]):
        subject.load_report([LoadDelta(f"m{number}", Load(*load))], 1.0)
    weights = subject.traffic.rules_of("m").weights
    held: dict[str, int] = data.draw(st.dictionaries(st.sampled_from(("m0", "m1")), st.integers(1, 10)))
    home = data.draw(st.sampled_from(("", "m0", "m1")))
    affinity = Affinity(held, 10, weights.prefix if held else 0.0, home, weights.session if home else 0.0)
    snapshot = subject.traffic.table.snapshot("m", "sha256:1")
    chosen = pick("m", "sha256:1", snapshot, affinity if held or home else None, weights=weights)
    assert chosen is not None
    assert {candidate.replica_id for candidate in chosen.considered} == {"m0", "m1"}
    for candidate in chosen.considered:
        scores = {
            "queue": candidate.queue_score,
            "running": candidate.running_score,
            "kv_usage": candidate.kv_score,
            "prefix": candidate.prefix_score,
            "session": candidate.session_score,
            "locality": candidate.locality_score,
        }
        assert candidate.score == pytest.approx(sum(share * scores[name] for name, share in chosen.shares.items()))


def test_settings_say_what_a_policy_may_say_and_are_refused_alike() -> None:
    assert set(NAMES) <= set(RoutingSettings.model_fields)
    assert RoutingSettings().rules() == Rules(Weights(locality=0.2))
    wrongs: tuple[dict[str, Any], ...] = (
        {"prefix_weight": 0.7, "session_weight": 0.4},
        dict.fromkeys(LOAD_WEIGHTS, 0.0),
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match="weight"):
            RoutingSettings(**wrong)
