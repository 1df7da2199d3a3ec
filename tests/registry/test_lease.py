"""What becomes of a lease, whatever its holders and the clock do."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.mesh.errors import Conflict, InvalidRequest
from helios.registry.leases.lease import Grant, Lease, Wish, acquired, check_wish, released, renewed

START_US = 1_000_000_000_000_000
HOLDERS = st.sampled_from(["a", "b", "c"])
TTLS = st.floats(1.0, 300.0)
WISH = Wish("proxy-leader", "a", 2.0, "unix:/a")


class Leases(RuleBasedStateMachine):
    """Three holders ask, renew and release, with grants old and new; the clock goes on, and is set back."""

    @initialize()
    def begin(self) -> None:
        self.lease = Lease("proxy-leader")
        self.now_us = START_US
        self.grants: list[Grant] = []

    @rule(holder=HOLDERS, ttl=TTLS, seen=st.integers(0, 30))
    def acquire(self, holder: str, ttl: float, seen: int) -> None:
        before = self.lease
        wish = Wish("proxy-leader", holder, ttl, seen_epoch=seen)
        self.lease = acquired(before, wish, self.now_us)
        if self.lease.epoch == before.epoch:
            assert before.is_held(self.now_us) or self.now_us < before.begins_at_us, "a free lease was refused"
            assert self.lease.holder == before.holder != holder
            return
        assert self.lease.epoch > max([seen, *(grant.epoch for grant in self.grants)])
        assert not before.is_held(self.now_us) or before.holder == holder, "a held lease was granted"
        assert self.lease.rest_seconds(self.now_us) == pytest.approx(ttl, abs=1e-6)
        self.grants.append(Grant("proxy-leader", holder, self.lease.epoch))

    @rule(data=st.data(), ttl=TTLS)
    def renew(self, data: st.DataObject, ttl: float) -> None:
        if not self.grants:
            return
        grant = data.draw(st.sampled_from(self.grants))
        held = self.now_us < self.lease.ends_at_us or self.now_us < self.lease.begins_at_us
        may = held and (self.lease.holder, self.lease.epoch) == (grant.holder, grant.epoch)
        if may:
            self.lease = renewed(self.lease, grant, ttl, self.now_us)
            assert self.lease.rest_seconds(self.now_us) == pytest.approx(ttl, abs=1e-6)
            return
        with pytest.raises(Conflict, match="not held with epoch") as caught:
            renewed(self.lease, grant, ttl, self.now_us)
        assert caught.value.reason == "LEASE_LOST"

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if not self.grants:
            return
        before, grant = self.lease, data.draw(st.sampled_from(self.grants))
        self.lease = released(before, grant)
        if (before.holder, before.epoch) == (grant.holder, grant.epoch):
            assert not self.lease.is_held(self.now_us)
        else:
            assert self.lease == before

    @rule(seconds=st.floats(0.0, 400.0))
    def time_passes(self, seconds: float) -> None:
        self.now_us += round(seconds * 1e6)

    @rule(seconds=st.floats(0.0, 4000.0))
    def clock_is_set_back(self, seconds: float) -> None:
        self.now_us -= round(seconds * 1e6)

    @invariant()
    def test_at_most_one_grant_can_be_renewed(self) -> None:
        assert sum(map(self._can_renew, getattr(self, "grants", ()))) <= 1

    @invariant()
    def test_no_lease_outlasts_its_ttl_beyond_the_next_look(self) -> None:
        if getattr(self, "grants", None):
            looked = acquired(self.lease, Wish("proxy-leader", "z", 1.0), self.now_us)
            assert looked.rest_seconds(self.now_us) <= 300.0

    def _can_renew(self, grant: Grant) -> bool:
        try:
            renewed(self.lease, grant, 1.0, self.now_us)
        except Conflict:
            return False
        return True


TestLeases = Leases.TestCase


def test_the_holder_is_granted_its_lease_anew() -> None:
    first = acquired(Lease("proxy-leader"), WISH, START_US)
    again = acquired(first, WISH, START_US + 1)
    assert (again.holder, again.epoch) == ("a", first.epoch + 1)
    with pytest.raises(Conflict):
        renewed(again, Grant("proxy-leader", "a", first.epoch), 2.0, START_US + 2)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        (Wish("Leader", "a", 2.0), "name"),
        (Wish("", "a", 2.0), "name"),
        (Wish("leader", "", 2.0), "holder"),
        (Wish("leader", "a b", 2.0), "holder"),
        (Wish("leader", "a", 2.0, address="x" * 257), "address"),
        (Wish("leader", "a", 0.5), "ttl"),
        (Wish("leader", "a", 301.0), "ttl"),
        (Wish("leader", "a", 2.0, seen_epoch=1 << 63), "seen_epoch"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(wish: Wish, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_wish(wish)
    assert (caught.value.reason, caught.value.metadata["param"]) == ("INVALID_LEASE", param)


def test_a_lie_about_what_was_seen_leaves_epochs_to_grant() -> None:
    lease = acquired(Lease("leader"), Wish("leader", "liar", 2.0, seen_epoch=1 << 62), START_US)
    for _ in range(2):
        wish = Wish("leader", "liar", 2.0, seen_epoch=lease.epoch)
        check_wish(wish)
        lease = acquired(lease, wish, START_US)
    assert lease.epoch == (1 << 62) + 3
    with pytest.raises(InvalidRequest):
        acquired(lease, Wish("leader", "liar", 2.0, seen_epoch=lease.epoch + 1), START_US)
