"""The account of requests."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from helios.worker.replica.engine import Meter
from helios.worker.replica.ledger import Changes, RequestLedger


class Ledger(RuleBasedStateMachine):
    """Requests come and go while reports are sent, and sometimes lost."""

    running = Bundle("running")
    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = RequestLedger()
        self.count = 0
        self.open: set[str] = set()
        self.reported_started: list[str] = []
        self.reported_finished: list[str] = []
        self.now = 0.0

    @rule(target=running)
    def start(self) -> Meter:
        self.count += 1
        self.now += 1
        meter = self.ledger.start(f"r{self.count}", self.now)
        self.open.add(meter.request_id)
        return meter

    @rule(meter=consumes(running), status=st.integers(0, 16), tokens=st.integers(0, 5))
    def finish(self, meter: Meter, status: int, tokens: int) -> None:
        self.now += 1
        meter.completion_tokens = tokens
        finished = self.ledger.finish(meter, status, self.now)
        self.open.discard(meter.request_id)
        assert finished.duration > 0
        assert (finished.status_code, finished.completion_tokens) == (status, tokens)

    @rule(target=taken)
    def take(self) -> Changes:
        return self.ledger.take()

    @rule(changes=consumes(taken))
    def arrive(self, changes: Changes) -> None:
        self.reported_started += [started.request_id for started in changes.started]
        self.reported_finished += [finished.request_id for finished in changes.finished]

    @rule(changes=consumes(taken))
    def lose(self, changes: Changes) -> None:
        self.ledger.give_back(changes)

    @invariant()
    def counts_what_runs(self) -> None:
        assert self.ledger.running_count == len(self.open)

    @invariant()
    def reports_nothing_twice(self) -> None:
        assert len(set(self.reported_started)) == len(self.reported_started)
        assert len(set(self.reported_finished)) == len(self.reported_finished)
        assert not set(self.reported_finished) & self.open


TestLedger = Ledger.TestCase
TestLedger.settings = settings(stateful_step_count=30)


def test_what_was_not_sent_comes_first_again() -> None:
    ledger = RequestLedger()
    first = ledger.start("a", 0.0)
    lost = ledger.take()
    ledger.finish(first, 0, 2.0)
    ledger.start("b", 3.0)
    ledger.give_back(lost)
    changes = ledger.take()
    assert [(started.request_id, started.arrived_at) for started in changes.started] == [("a", 0.0), ("b", 3.0)]
    assert [finished.request_id for finished in changes.finished] == ["a"]
    assert ledger.take() == Changes((), ())


def test_time_to_first_token_is_that_of_the_request() -> None:
    ledger = RequestLedger()
    meter = ledger.start("a", 10.0)
    meter.first_token_at = 10.5
    assert ledger.finish(meter, 0, 12.0).time_to_first_token == 0.5
    assert ledger.finish(ledger.start("b", 10.0), 3, 12.0).time_to_first_token is None
