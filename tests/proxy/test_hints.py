"""What engines are told of requests: what is known, and nothing of those of whom nothing is."""

from helios.mesh.names import COHORT_HEADER, EXPECTED_TOKENS_HEADER, PRIORITY_HEADER
from helios.proxy.admission.history import History
from helios.proxy.admission.keyring import ANYBODY, Caller
from helios.proxy.picker.hints import hint_headers
from helios.proxy.routing.prefix import NO_BLOCKS, blocks_of


def test_nobody_s_short_prompt_carries_nothing() -> None:
    assert hint_headers(ANYBODY, "m", NO_BLOCKS, History()) == {}
    assert hint_headers(ANYBODY, "m", blocks_of(b"x" * 700, ""), History()) == {}


def test_a_key_s_band_and_what_its_answers_had_travel_along() -> None:
    history = History()
    for _ in range(100):
        history.learn("m", "k", 400, 100, 30)
    told = hint_headers(Caller(key_id="k", priority=3), "m", NO_BLOCKS, history)
    assert told == {PRIORITY_HEADER: "3", EXPECTED_TOKENS_HEADER: "30"}
    assert hint_headers(Caller(key_id="k"), "other", NO_BLOCKS, history)[EXPECTED_TOKENS_HEADER] == "256"


def test_prompts_that_begin_alike_are_of_one_cohort() -> None:
    system = b"You are a pirate. " * 100
    one, other = (blocks_of(system + tail, "") for tail in (b"Hello", b"What is this? " * 50))
    cohorts = {hint_headers(ANYBODY, "m", blocks, History())[COHORT_HEADER] for blocks in (one, other)}
    assert len(cohorts) == 1
    assert cohorts != {hint_headers(ANYBODY, "m", blocks_of(b"Else. " * 400, ""), History())[COHORT_HEADER]}
