"""Leases as a machine: what is promised holds, whatever order things come in."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.mesh.errors import InvalidRequest, NotFound
from helios.storage.eviction import plan_eviction
from helios.storage.inventory import Inventory, Resident
from helios.storage.leases import DEFAULT_TTL, MAX_TTL, MIN_TTL, Lease, LeaseTable, check_ttl, restore
from helios.storage.manifest import Digest, Manifest, ManifestEntry, make_manifest, manifest_digest

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def manifest_of(*letters: str, size_bytes: int = 10) -> Manifest:
    entries = [ManifestEntry(x, Digest(x * 64, size_bytes), "raw") for x in sorted(letters)]
    return make_manifest(manifest_digest(entries), entries)


MANIFESTS = {m.revision: m for m in (manifest_of("a", "b"), manifest_of("b", "c"), manifest_of("d"))}


class LeaseMachine(RuleBasedStateMachine):
    """A table beside a model of it: the id, revision and end of every lease that was ever granted."""

    @initialize()
    def begin(self) -> None:
        self.now = NOW
        self.table = LeaseTable()
        self.model: dict[str, Lease] = {}
        self.freed: list[str] = []
        self.inventory = Inventory(
            {blob for m in MANIFESTS.values() for blob in m.blobs}, [Resident(m, NOW) for m in MANIFESTS.values()]
        )

    def _alive(self) -> list[Lease]:
        return [lease for lease in self.model.values() if self.now < lease.ends_at]

    @rule(revision=st.sampled_from(sorted(MANIFESTS)), seconds=st.integers(5, 3600))
    def grant(self, revision: str, seconds: int) -> None:
        lease = self.table.grant(revision, holder="h", ttl=timedelta(seconds=seconds), now=self.now)
        assert lease.id not in self.model
        self.model[lease.id] = lease

    @rule(seconds=st.integers(0, 4000))
    def pass_time(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(list(self.model.values())))
        if lease in self._alive():
            self.model[lease.id] = renewed = self.table.renew(lease.id, self.now)
            assert renewed.ends_at == self.now + lease.ttl
        else:
            with pytest.raises(NotFound):
                self.table.renew(lease.id, self.now)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), revision=st.sampled_from(sorted(MANIFESTS)))
    def resume(self, data: st.DataObject, revision: str) -> None:
        lease = data.draw(st.sampled_from(list(self.model.values())))
        if lease in self._alive() and lease.revision == revision:
            self.model[lease.id] = self.table.resume(lease.id, revision, ttl=None, now=self.now)
        else:
            with pytest.raises(NotFound):
                self.table.resume(lease.id, revision, ttl=None, now=self.now)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(list(self.model.values())))
        was_alive = lease in self._alive()
        released = self.table.release(lease.id, self.now)
        assert (released is not None) == was_alive
        if released is not None:
            self.freed.append(lease.id)
            del self.model[lease.id]

    @rule()
    def expire(self) -> None:
        for lease in self.table.expire(self.now):
            assert not lease.is_alive(self.now)
            self.freed.append(lease.id)
            del self.model[lease.id]

    @rule()
    def restart(self) -> None:
        self.table = LeaseTable(restore(self.table.alive(self.now), self.now))
        self.model = {lease.id: lease for lease in self._alive()}

    @invariant()
    def test_a_leased_revision_is_never_evictable(self) -> None:
        if not hasattr(self, "model"):
            return
        leased = {lease.revision for lease in self._alive()}
        plan = plan_eviction(self.inventory, 10**9, held=self.table.count_by_revision(self.now))
        assert set(plan.revisions) == set(MANIFESTS) - leased
        assert not set(plan.blobs) & {blob for revision in leased for blob in MANIFESTS[revision].blobs}

    @invariant()
    def test_every_lease_is_freed_once(self) -> None:
        assert len(getattr(self, "freed", [])) == len(set(getattr(self, "freed", [])))

    @invariant()
    def test_the_table_and_the_model_agree(self) -> None:
        if hasattr(self, "model"):
            assert sorted(lease.id for lease in self.table.alive(self.now)) == sorted(x.id for x in self._alive())


TestLeaseMachine = LeaseMachine.TestCase


@pytest.mark.parametrize(("given", "expected"), [(None, DEFAULT_TTL), (MIN_TTL, MIN_TTL), (MAX_TTL, MAX_TTL)])
def test_bounds_of_the_time_to_live(given: timedelta | None, expected: timedelta) -> None:
    assert check_ttl(given) == expected


@pytest.mark.parametrize("given", [timedelta(0), MIN_TTL - timedelta(microseconds=1), MAX_TTL + timedelta(seconds=1)])
def test_a_time_to_live_out_of_bounds_is_refused(given: timedelta) -> None:
    with pytest.raises(InvalidRequest) as raised:
        LeaseTable().grant("r", holder="h", ttl=given, now=NOW)
    assert raised.value.reason == "INVALID_TTL"


def test_ids_can_not_be_guessed() -> None:
    table = LeaseTable()
    ids = {table.grant("r", holder="h", ttl=None, now=NOW).id for _ in range(1000)}
    assert len(ids) == 1000
    assert min(map(len, ids)) >= 32


def test_the_end_is_exclusive() -> None:
    lease = LeaseTable().grant("r", holder="h", ttl=MIN_TTL, now=NOW)
    assert lease.is_alive(NOW + MIN_TTL - timedelta(microseconds=1))
    assert not lease.is_alive(NOW + MIN_TTL)


def test_a_wall_clock_that_was_set_back_lets_no_lease_live_for_days() -> None:
    lease = LeaseTable().grant("r", holder="h", ttl=MIN_TTL, now=NOW)
    (restored,) = restore([lease], NOW - timedelta(days=3))
    assert restored.ends_at == NOW - timedelta(days=3) + MIN_TTL
