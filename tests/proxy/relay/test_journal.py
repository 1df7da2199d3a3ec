"""What follows where a replica breaks off."""

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.mesh.errors import Bug, InvalidRequest, QuotaExceeded, Unavailable
from helios.proxy.relay.journal import Journal, Next

LIMIT = 2


class JournalMachine(RuleBasedStateMachine):
    """Replicas deliver tokens and break off; the model counts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal(LIMIT)
        self.tokens: list[int] = []
        self.since_break = 0
        self.barren = 0
        self.is_over = False

    @precondition(lambda self: not self.is_over)
    @rule(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
    def a_message_comes(self, sizes: list[int]) -> None:
        token_ids = list(range(len(self.tokens), len(self.tokens) + sum(sizes)))
        if not self.tokens:
            self.journal.opened([1, 2, 3], 0, 7)
        self.journal.delivered(1, token_ids, sizes)
        self.tokens += token_ids
        self.since_break += len(token_ids)

    @precondition(lambda self: not self.is_over)
    @rule(error=st.sampled_from([Unavailable("gone"), Bug("broken")]))
    def a_replica_breaks_off(self, error: Unavailable | Bug) -> None:
        self.barren = 0 if self.since_break else self.barren + 1
        self.since_break = 0
        goes_on = self.barren <= LIMIT and (bool(self.tokens) or isinstance(error, Unavailable))
        assert self.journal.broken(error) is (Next.ANOTHER if goes_on else Next.FAIL)
        self.is_over = not goes_on

    @precondition(lambda self: not self.is_over)
    @rule(error=st.sampled_from([InvalidRequest("no"), QuotaExceeded("much")]))
    def the_request_is_wrong(self, error: InvalidRequest | QuotaExceeded) -> None:
        assert self.journal.broken(error) is Next.FAIL
        self.is_over = True

    @precondition(lambda self: self.is_over)
    @rule()
    def nothing_follows(self) -> None:
        assert not self.journal.is_finished

    @invariant()
    def remembers_every_token_once(self) -> None:
        assert list(self.journal.token_ids) == self.tokens
        assert sum(self.journal.sizes) == len(self.tokens)
        assert self.journal.has_progress == bool(self.tokens)


TestJournal = JournalMachine.TestCase


def test_an_answer_that_is_not_streamed_fails_by_its_own_error_at_once() -> None:
    assert Journal(LIMIT).broken(Bug("broken")) is Next.FAIL
    assert Journal(LIMIT).broken(Unavailable("gone")) is Next.ANOTHER
