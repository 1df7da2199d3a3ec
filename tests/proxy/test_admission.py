"""Keys, limits and history: who is recognised, what they may use, and that no window ever has more than its limit."""

import hashlib
import re
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.mesh.errors import InvalidRequest, ModelNotFound, QuotaExceeded, Unauthenticated, Unavailable
from helios.mesh.names import KEY_PREFIX
from helios.proxy.admission.bucket import Bucket
from helios.proxy.admission.history import History
from helios.proxy.admission.keyring import ANYBODY, Caller, Keyring, check_model
from helios.proxy.admission.quotas import Quotas, Usage
from helios.proxy.fleet.state import Load
from helios.proxy.picker.limits import duration
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import core, entry, hello, replica

SECRET = f"{KEY_PREFIX}{'a' * 43}"
NOW = 1_800_000_000.0
UNAVAILABLE = 14


def bearer(secret: str) -> str:
    return f"Bearer {secret}"


def ring(caller: Caller, *, is_required: bool = True) -> Keyring:
    keyring = Keyring(is_required=is_required)
    keyring.replace([(hashlib.sha256(SECRET.encode()).digest(), caller)])
    return keyring


def test_a_key_is_recognised_by_its_hash() -> None:
    caller = Caller("key-1", "shop")
    assert ring(caller).identify(bearer(SECRET), NOW) is caller
    assert ring(caller).identify(f"bearer  {SECRET} ", NOW) is caller


@pytest.mark.parametrize("secret", ["", SECRET + "a", SECRET[:-1], "sk-other", KEY_PREFIX, "\udce9"])
@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_no_other_secret_is_taken(secret: str, scheme: str) -> None:
    with pytest.raises(Unauthenticated):
        ring(Caller("key-1")).identify(f"{scheme} {secret}", NOW)


def test_an_ended_key_is_refused_at_its_moment() -> None:
    keyring = ring(Caller("key-1", expires_at=NOW))
    assert keyring.identify(bearer(SECRET), NOW - 0.001).key_id == "key-1"
    with pytest.raises(Unauthenticated) as caught:
        keyring.identify(bearer(SECRET), NOW)
    assert caught.value.reason == "INVALID_API_KEY"
    keyring.replace([])
    with pytest.raises(Unauthenticated):
        keyring.identify(bearer(SECRET), NOW - 1)


def test_where_no_key_is_required_only_a_helios_key_counts() -> None:
    keyring = ring(Caller("key-1"), is_required=False)
    for authorization in ("", bearer("none"), bearer("sk-other"), "Basic YTpi"):
        assert keyring.identify(authorization, NOW) is ANYBODY
    assert keyring.identify(bearer(SECRET), NOW).key_id == "key-1"
    with pytest.raises(Unauthenticated):
        keyring.identify(bearer(SECRET + "x"), NOW)


def test_nobody_is_refused_for_good_before_the_keys_are_known() -> None:
    with pytest.raises(Unavailable):
        Keyring(is_required=True).identify(bearer(SECRET), NOW)


@pytest.mark.parametrize(
    ("models", "name", "is_allowed"),
    [
        ((), "anything", True),
        (("smol*",), "smollm2", True),
        (("smol*",), "small", True),  # An alias of smollm2.
        (("small",), "small", True),
        (("smol",), "smollm2", False),
        (("*lm?",), "smollm2", False),  # No other character than * stands for others.
        (("a", "smollm2"), "smollm2@prod", True),
        (("smollm2@prod",), "smollm2@prod", True),
        (("smollm2@prod",), "smollm2", False),
        (("smollm2",), "poet", False),  # An adapter goes by its own name.
        (("poet",), "poet", True),
        (("poet",), "smollm2", False),
    ],
)
def test_a_key_may_use_what_its_globs_name(models: tuple[str, ...], name: str, is_allowed: bool) -> None:
    settings = '{"lora": {"adapters": [{"name": "poet", "model": "poet-lora"}]}}'
    model = entry("smollm2", aliases=("small",), engine_settings=settings)
    adapters = model.adapters
    assert (name == "poet") == (name in adapters)
    caller = Caller("key-1", models=models)
    if is_allowed:
        check_model(caller, model, name)
    else:
        with pytest.raises(ModelNotFound):
            check_model(caller, model, name)


def test_a_callers_fields_come_back_from_a_file() -> None:
    caller = Caller("key-1", "shop", ("a*", "b"), 3, 400, 1, 7, NOW)
    assert Caller.of_fields({**caller.as_fields(), "models": ["a*", "b"]}) == caller


# Uses of a bucket: what is reserved, after how long, and how much of it is used how much later.
USES = st.lists(
    st.tuples(st.integers(1, 80), st.floats(0, 90), st.floats(0, 1), st.floats(0, 90)), min_size=1, max_size=40
)


@given(uses=USES, per_minute=st.integers(1, 100))
def test_no_window_has_more_than_its_limit_and_one_burst(
    uses: list[tuple[int, float, float, float]], per_minute: int
) -> None:
    bucket, now = Bucket(per_minute), 0.0
    granted: list[tuple[float, int, int]] = []
    settled: list[tuple[float, int]] = []

    def settle_until(moment: float) -> None:
        for due, reserved, actual in sorted(one for one in granted if one[0] <= moment):
            bucket.settle(reserved, actual, due)
            settled.append((due, actual))
            granted.remove((due, reserved, actual))

    for amount, wait, share, later in uses:
        now += wait
        settle_until(now)
        if not bucket.reserve(amount, now):
            granted.append((now + later, amount, int(share * amount)))
    settle_until(1e9)
    settled.sort()
    for first, (begin, _) in enumerate(settled):
        for total, (end, _) in zip(accumulate(used for _, used in settled[first:]), settled[first:], strict=True):
            assert total <= per_minute + (end - begin) * per_minute / 60 + 1e-3


@given(amount=st.integers(1, 50), used=st.integers(0, 50))
def test_what_is_refused_fits_after_the_time_that_was_told(amount: int, used: int) -> None:
    bucket = Bucket(50)
    assert bucket.reserve(used, 0.0) == 0.0
    bucket.settle(used, used, 0.0)
    wait = bucket.reserve(amount, 0.0)
    assert (wait > 0) == (amount + used > 50)
    if wait:
        assert bucket.reserve(amount, wait * 0.99) > 0
        assert bucket.reserve(amount, wait + 1e-6) == 0.0


def test_an_overdraft_is_owed() -> None:
    bucket = Bucket(60)
    assert bucket.reserve(10, 0.0) == 0.0
    bucket.settle(10, 100, 0.0)
    assert bucket.remaining(0.0) == 0
    assert bucket.reserve(1, 40.0) == pytest.approx(1.0)
    assert bucket.reserve(1, 41.0) == 0.0


LIMITED = Caller("key-1", requests_per_minute=6, tokens_per_minute=1000)


def ask(quotas: Quotas, request_id: str, now: float = 0.0, *, max_tokens: int = 100, caller: Caller = LIMITED) -> None:
    quotas.admit(caller, request_id, "m", body_bytes=400, max_tokens=max_tokens, now=now)


def test_requests_of_nobody_are_not_counted() -> None:
    quotas = Quotas()
    assert quotas.admit(ANYBODY, "q", "m", body_bytes=10**9, max_tokens=10**9, now=0.0) is None
    assert quotas.standing(ANYBODY, 0.0) is None


def test_what_was_not_used_is_given_back() -> None:
    quotas = Quotas()
    ask(quotas, "q")
    reserved = quotas.standing(LIMITED, 0.0)
    assert reserved is not None
    assert (reserved.token_remaining, reserved.request_remaining) == (1000 - 200, 5)
    quotas.finished(Usage("q", 0, 90, 10), 0.0)
    settled = quotas.standing(LIMITED, 0.0)
    assert settled is not None
    assert settled.token_remaining == 900
    ask(quotas, "left")
    quotas.release("left", 0.0)
    after = quotas.standing(LIMITED, 0.0)
    assert after is not None
    # The request counts, its tokens don't.
    assert (after.token_remaining, after.request_remaining) == (900, 4)


def test_the_reason_says_which_limit_it_was() -> None:
    quotas = Quotas()
    for number in range(5):
        ask(quotas, f"q{number}")
    with pytest.raises(QuotaExceeded) as tokens:
        ask(quotas, "one too many")
    assert tokens.value.reason == "RATE_LIMIT_TOKENS"
    assert tokens.value.retry_after_seconds == pytest.approx(12.0)
    for number in range(5):
        quotas.release(f"q{number}", 0.0)
    ask(quotas, "sixth")
    with pytest.raises(QuotaExceeded) as requests:
        ask(quotas, "seventh")
    assert requests.value.reason == "RATE_LIMIT_REQUESTS"
    assert requests.value.retry_after_seconds == pytest.approx(10.0)


def test_a_request_that_never_fits_is_told_so_and_a_guess_is_not() -> None:
    quotas = Quotas()
    with pytest.raises(InvalidRequest) as caught:
        ask(quotas, "q", max_tokens=1001)
    assert caught.value.reason == "EXCEEDS_TOKEN_LIMIT"
    small = replace(LIMITED, tokens_per_minute=50)
    ask(quotas, "guess", max_tokens=0, caller=small)
    standing = quotas.standing(small, 0.0)
    assert standing is not None
    assert standing.token_remaining == 0


def test_a_request_that_envoy_tries_elsewhere_is_settled_where_it_ends() -> None:
    quotas = Quotas()

    def remaining() -> int:
        standing = quotas.standing(LIMITED, 1.0)
        assert standing is not None
        return standing.token_remaining

    ask(quotas, "q", 1.0)
    quotas.finished(Usage("q", UNAVAILABLE, 0, 0), 1.0)
    quotas.finished(Usage("q", 0, 90, 60), 1.0)
    assert remaining() == 850
    ask(quotas, "refused", 1.0)
    held = remaining()
    quotas.finished(Usage("refused", UNAVAILABLE, 0, 0), 1.0)
    quotas.tick(15.0)
    assert remaining() == held < 850
    quotas.tick(16.0)
    assert remaining() == 850


def test_what_lapsed_is_charged_when_it_ends_after_all() -> None:
    quotas = Quotas()
    for number in range(5):
        # Each body is slower than a reservation lives.
        now = 100.0 * number
        ask(quotas, f"q{number}", now)
        quotas.lapse(f"q{number}", now + 15.0)
        quotas.started(f"q{number}")
        quotas.finished(Usage(f"q{number}", 0, 100, 900), now + 20.0)
        standing = quotas.standing(LIMITED, now + 20.0)
        assert standing is not None
        assert standing.token_remaining == 0
        with pytest.raises(QuotaExceeded):
            ask(quotas, "next", now + 20.0)


def test_what_lapsed_is_charged_once_and_to_the_limits_that_its_key_has_then() -> None:
    quotas = Quotas()
    ask(quotas, "q", 0.0)
    quotas.lapse("q", 15.0)
    # The account is forgotten as idle, and made anew with other limits.
    quotas.tick(700.0)
    other = replace(LIMITED, tokens_per_minute=500)
    ask(quotas, "other", 700.0, caller=other)
    quotas.release("other", 700.0)
    for _ in range(2):
        quotas.finished(Usage("q", 0, 0, 200), 700.0)
    standing = quotas.standing(other, 700.0)
    assert standing is not None
    assert standing.token_remaining == 300


def test_a_request_that_runs_elsewhere_is_in_no_doubt() -> None:
    quotas = Quotas()
    ask(quotas, "q")
    quotas.finished(Usage("q", UNAVAILABLE, 0, 0), 0.5)
    quotas.started("q")
    quotas.tick(16.0)
    held = quotas.standing(LIMITED, 16.0)
    assert held is not None
    assert held.token_remaining == 800
    quotas.finished(Usage("q", 0, 100, 900), 60.0)
    settled = quotas.standing(LIMITED, 60.0)
    assert settled is not None
    assert settled.token_remaining == 0


def test_doubt_that_was_wrong_is_paid_for() -> None:
    quotas = Quotas()
    ask(quotas, "q")
    # The word of its start elsewhere came before that of its end here.
    quotas.started("q")
    quotas.finished(Usage("q", UNAVAILABLE, 0, 0), 0.5)
    quotas.tick(16.0)
    quotas.finished(Usage("q", 0, 100, 900), 60.0)
    settled = quotas.standing(LIMITED, 60.0)
    assert settled is not None
    assert settled.token_remaining == 0


def test_a_workers_hello_and_a_slow_body_let_no_tokens_through() -> None:
    subject = core()
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello(replicas=(replica(),)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    quotas = subject.traffic.quotas
    for request_id in ("slow", "runs"):
        ask(quotas, request_id)
        assert subject.pick(entry(), request_id, 0.0) is not None
    subject.load_report([LoadDelta("r", Load(), started=("runs",))], 1.0)
    subject.worker_hello(hello(replicas=(replica(),)), 2.0)
    subject.worker_seen("w", 16.0)
    subject.tick(16.0)
    usages = (Usage("slow", 0, 100, 300), Usage("runs", 0, 100, 500))
    finished = (("slow", 0), ("runs", 0))
    subject.load_report([LoadDelta("r", Load(), started=("slow",), finished=finished, usage=usages)], 120.0)
    standing = quotas.standing(LIMITED, 120.0)
    assert standing is not None
    # 400, and what was not settled as reserved of 600.
    assert standing.token_remaining == 1000 - 400 - (600 - 200)


def test_the_news_of_a_start_elsewhere_ends_doubt() -> None:
    subject = core()
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello(replicas=(replica(), replica("s", address="127.0.0.1:1001"))), 0.0)
    ask(subject.traffic.quotas, "q")
    refused = (Usage("q", UNAVAILABLE, 0, 0),)
    subject.load_report([LoadDelta("r", Load(), ("q",), (("q", UNAVAILABLE),), refused)], 1.0)
    subject.load_report([LoadDelta("s", Load(), ("q",))], 2.0)
    subject.tick(20.0)
    standing = subject.traffic.quotas.standing(LIMITED, 20.0)
    assert standing is not None
    assert standing.token_remaining == 800


class QuotaMachine(RuleBasedStateMachine):
    """Quotas under requests that end in every way there is."""

    @initialize()
    def begin(self) -> None:
        self.quotas = Quotas()
        self.now = 0.0
        self.open: dict[str, int] = {}
        self.count = 0

    @rule(max_tokens=st.integers(1, 900), body=st.integers(0, 400))
    def ask(self, max_tokens: int, body: int) -> None:
        self.count += 1
        request = f"q{self.count}"
        caller = replace(LIMITED, requests_per_minute=0)
        try:
            self.quotas.admit(caller, request, "m", body_bytes=body, max_tokens=max_tokens, now=self.now)
        except (QuotaExceeded, InvalidRequest):
            return
        self.open[request] = max_tokens

    @rule(number=st.integers(1, 30), tokens=st.integers(0, 900), code=st.sampled_from([0, 1, 13, UNAVAILABLE]))
    def finish(self, number: int, tokens: int, code: int) -> None:
        self.quotas.finished(Usage(f"q{number}", code, 0, min(tokens, self.open.get(f"q{number}", 0))), self.now)

    @rule(number=st.integers(1, 30))
    def release(self, number: int) -> None:
        self.quotas.release(f"q{number}", self.now)

    @rule(number=st.integers(1, 30))
    def lose(self, number: int) -> None:
        self.quotas.lost([f"q{number}"], self.now)

    @rule(number=st.integers(1, 30))
    def lapse(self, number: int) -> None:
        self.quotas.lapse(f"q{number}", self.now)

    @rule(number=st.integers(1, 30))
    def start(self, number: int) -> None:
        self.quotas.started(f"q{number}")

    @rule(seconds=st.floats(0, 5000))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.quotas.tick(self.now)

    @invariant()
    def test_what_is_held_is_what_is_reserved(self) -> None:
        standing = self.quotas.standing(LIMITED, self.now)
        if standing is not None:
            assert 0 <= standing.token_remaining <= 1000

    def teardown(self) -> None:
        if not hasattr(self, "quotas"):
            return
        # Once all is over, all of it is there again: nothing was counted twice, and nothing leaked.
        self.now += 10_000.0
        self.quotas.tick(self.now)
        standing = self.quotas.standing(LIMITED, self.now + 10_000.0)
        assert standing is None or standing.token_remaining == 1000


TestQuotas = QuotaMachine.TestCase


def test_history_follows_what_answers_take_and_stays_small() -> None:
    history = History()
    assert history.prompt_tokens("m", 400) == 100
    for _ in range(60):
        history.learn("m", "key-1", 400, 200, 50)
    assert history.prompt_tokens("m", 400) == pytest.approx(200, abs=2)
    assert (history.answer_tokens("m", "key-1"), history.long_answer_tokens("m", "key-1")) == (50, 50)
    for number in range(200):
        history.learn("m", "key-1", 400, 200, 40 if number % 2 else 60)
    assert history.answer_tokens("m", "key-1") < history.long_answer_tokens("m", "key-1") < 90
    for number in range(5000):
        history.learn("m", f"key {number}", 400, 200, 7)
    assert history.answer_tokens("m", "key 4999") == 7
    assert history.answer_tokens("m", "key-1") == 256


@given(seconds=st.floats(0, 100_000))
def test_times_are_written_as_openai_writes_them(seconds: float) -> None:
    match = re.fullmatch(r"(?:(\d+)ms|(?:(\d+)m)?(\d+(?:\.\d{1,3})?)s)", duration(seconds))
    assert match is not None
    milliseconds, minutes, rest = match.groups()
    read = int(milliseconds) / 1000 if milliseconds else 60 * int(minutes or 0) + float(rest)
    assert read == pytest.approx(seconds, abs=0.0006)
