"""What a KV cache lost, on its way: which prompts a block cuts, the numbered log, the pipe, the supervisor's feed."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from helios.worker.engines.vllm.kept_prompts import KeptPrompts
from helios.worker.replica.kv_losses import Loss, Losses, LossLog, joined
from helios.worker.replica.loss_pipe import LossPipe
from helios.worker.replica.loss_wire import losses_from_proto, losses_to_proto
from helios.worker.supervisor.fleet import FleetFeed
from helios.worker.supervisor.outbox import LoadReport, Outbox
from helios.worker.supervisor.records import Load, LoadDelta, ReplicaState, ReplicaView, WorkerView
from helios.worker.supervisor.wire import delta_from_proto, delta_to_proto
from tests.worker.supervisor.test_outbox import view

NAMES = st.sampled_from("abcd")
STEPS = st.lists(st.one_of(st.tuples(NAMES, st.integers(0, 9)), st.none()), max_size=30)
"""Losses of a request that keeps so many tokens; None: the cache is emptied."""


def loss(name: str, kept: int = 0) -> Loss:
    return Loss(name, kept, 100)


class Listener:
    """Whoever hears of losses by the rule of the numbers; what it knows of requests that it did not hear of is None."""

    def __init__(self) -> None:
        self.heard = 0
        self.known: dict[str, int] = {}
        self.forgotten_count = 0

    def hear(self, losses: Losses) -> None:
        if losses.after > self.heard:
            self.known.clear()
            self.forgotten_count += 1
        self.heard = max(self.heard, losses.sequence)
        self.known |= {told.request_id: told.kept_tokens for told in losses.losses}


@given(STEPS, st.integers(1, 5), st.sets(st.integers(0, 29)), st.sets(st.integers(0, 29)))
def test_a_listener_that_hears_of_anything_knows_all_or_knows_that_it_does_not(
    steps: list[tuple[str, int] | None], capacity: int, heard_at: set[int], begins_anew_at: set[int]
) -> None:
    log, listener, since = LossLog(capacity), Listener(), 0
    truth: dict[str, int] = {}
    for number, step in enumerate(steps):
        if step is None:
            log.emptied()
            truth.clear()
        else:
            log.note([loss(*step)])
            truth[step[0]] = step[1]
        if number in begins_anew_at:
            since = 0
        if number in heard_at:
            told = log.since(since)
            listener.hear(losses_from_proto(losses_to_proto(told)))
            since = told.sequence
    listener.hear(log.since(since))
    assert listener.known.items() <= truth.items()
    if not listener.forgotten_count:
        assert listener.known == truth


@given(STEPS, st.sets(st.integers(0, 29)))
def test_reports_that_were_joined_say_what_they_said(steps: list[tuple[str, int] | None], cuts: set[int]) -> None:
    log, apart, together, since, waiting = LossLog(), Listener(), Listener(), 0, None
    for number, step in enumerate(steps):
        if step is None:
            log.emptied()
        else:
            log.note([loss(*step)])
        told = log.since(since)
        since = told.sequence
        apart.hear(told)
        waiting = joined(waiting, told)
        if number in cuts and waiting is not None:
            together.hear(waiting)
            waiting = None
    if waiting is not None:
        together.hear(waiting)
    assert together.known == apart.known
    assert together.heard == apart.heard


def test_what_is_too_much_is_missed_and_not_hidden() -> None:
    first = Losses(1000, 0, tuple(loss(f"a{number}") for number in range(1000)))
    second = Losses(1100, 1000, tuple(loss(f"b{number}") for number in range(100)))
    assert joined(first, second) == second
    log = LossLog(2)
    log.note([loss("a"), loss("b"), loss("c")])
    assert log.since(0) == Losses(3, 1, (loss("b"), loss("c")))
    assert log.since(3) == Losses(3, 3)


def test_the_pipe_drops_rather_than_waits_and_says_so() -> None:
    log = LossLog()
    with LossPipe() as pipe:
        pipe.read(log)
        assert not log.is_told
        pipe.writer.begin()
        pipe.writer.tell([loss(f"q{number}", number) for number in range(1000)])
        pipe.read(log)
        assert log.is_told
        assert [told.kept_tokens for told in log.since(0).losses] == list(range(1000))
        for number in range(1001):
            pipe.writer.tell([loss("x" * 100, number)] * 100)
        pipe.read(log)
        read = log.since(0).sequence
        assert read < 1000 + 1000 * 100, "a socket has no room for all of it"
        pipe.writer.tell([loss("last")])
        pipe.read(log)
        assert log.since(read) == Losses(read + 2, read + 1, (loss("last"),))
        pipe.writer.tell_emptied()
        pipe.read(log)
        assert log.since(read + 2) == Losses(read + 3, read + 3)


def test_a_block_cuts_the_prompts_that_have_it_and_no_others() -> None:
    kept = KeptPrompts(16, most_blocks=100)
    kept.begin("one", ("a", "ab", "abc"), 50)
    kept.begin("two", ("a", "ab", "abd"), 60)
    kept.begin("three", ("x",), 20)
    kept.dropped("abc")
    assert kept.take() == [Loss("one", 32, 50)]
    kept.dropped("a")
    kept.dropped("ab")
    assert sorted(kept.take(), key=lambda told: told.request_id) == [Loss("one", 0, 50), Loss("two", 0, 60)]
    kept.dropped("unknown")
    assert kept.take() == []
    assert (len(kept._prompts), len(kept)) == (2, 2)


def test_several_answers_to_a_prompt_are_one_prompt() -> None:
    kept = KeptPrompts(16, most_blocks=100, most_prompts=2)
    kept.begin("other", ("a",), 20)
    for _ in range(4):
        kept.begin("one", ("a", "ab"), 40)
    kept.dropped("a")
    assert kept.take() == [Loss("other", 0, 20), Loss("one", 0, 40)]


def test_a_beginning_of_many_is_told_of_the_last_ones_and_a_table_that_is_full_tells_what_it_gives_up() -> None:
    kept = KeptPrompts(16, most_blocks=4, most_prompts=2)
    for name in ("q1", "q2", "q3"):
        kept.begin(name, ("a",), 20)
    assert len(kept._prompts) == 2
    kept.dropped("a")
    assert [told.request_id for told in kept.take()] == ["q2", "q3"]
    kept.begin("first", ("b", "bc"), 40)
    kept.begin("second", ("d", "de", "def"), 60)
    assert kept.take() == [Loss("first", 0, 40)]
    assert (len(kept._prompts), len(kept)) == (1, 3)


def deltas(outbox: Outbox) -> list[LoadDelta]:
    """What a proxy is told, through the contract's messages."""
    reports = [message for message in outbox.take(is_load_due=True) if isinstance(message, LoadReport)]
    return [delta_from_proto(delta_to_proto(delta)) for report in reports for delta in report.deltas]


def test_a_session_begins_with_what_was_lost_before_and_ends_with_the_replica() -> None:
    known = view("r", ReplicaState.READY)
    feed = FleetFeed(lambda: WorkerView("w", "1", "node", "0", (), (), 1, (known,)))
    told = Losses(2, 0, (loss("a"), loss("b", 5)))
    with feed.subscribe(lambda _: None) as (_, early):
        feed.report(LoadDelta("r", Load(running_requests=1), losses=told))
        feed.report(LoadDelta("r", Load(running_requests=2), started=("q",)))
        feed.report(LoadDelta("r", Load(running_requests=3), losses=Losses(3, 2, (loss("b"),))))
        assert deltas(early) == [
            LoadDelta("r", Load(running_requests=3), ("q",), losses=Losses(3, 0, (loss("a"), loss("b"))))
        ]
        known = replace(known, load=Load(running_requests=3))
        with feed.subscribe(lambda _: None) as (_, late):
            assert deltas(late) == [
                LoadDelta("r", Load(running_requests=3), losses=Losses(3, 0, (loss("a"), loss("b"))))
            ]
        ended: ReplicaView = view("r", ReplicaState.STOPPED)
        feed.publish(ended)
        with feed.subscribe(lambda _: None) as (_, last):
            assert deltas(last) == []
