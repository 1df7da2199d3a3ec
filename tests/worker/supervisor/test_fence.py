"""Commands of leaders of the past are refused, whoever was cut off, came back, or was started again."""

from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.mesh.errors import PreconditionFailed
from helios.worker.supervisor.epoch_file import EpochFile
from helios.worker.supervisor.fence import STALE_LEADER, Fence

PROXIES = st.sampled_from(["a", "b", "c"])


class Leaders(RuleBasedStateMachine):
    """Three proxies get the lease in turns, and believe for as long as they like that they still have it."""

    @initialize()
    def begin(self) -> None:
        self.kept = 0
        self.fence = Fence(self.kept, self._keep)
        self.granted = 0
        self.believed: dict[str, int] = {}
        self.heard: set[int] = {0}
        self.done: list[int] = []

    @rule(proxy=PROXIES)
    def is_granted_the_lease(self, proxy: str) -> None:
        self.granted += 1
        self.believed[proxy] = self.granted

    @rule(proxy=PROXIES)
    def says_its_epoch(self, proxy: str) -> None:
        self._hear(self.believed.get(proxy, 0))
        self.fence.hear(proxy, self.believed.get(proxy, 0))

    @rule(proxy=PROXIES)
    def learns_that_it_lost_the_lease(self, proxy: str) -> None:
        if self.believed.get(proxy) != self.granted:
            self.believed.pop(proxy, None)

    @rule(proxy=PROXIES)
    def session_ends(self, proxy: str) -> None:
        self.fence.left(proxy)

    @rule(proxy=PROXIES)
    def commands(self, proxy: str) -> None:
        epoch = self.believed.get(proxy, 0)
        if not epoch:
            return
        if epoch < max(self.heard):
            with pytest.raises(PreconditionFailed) as caught:
                self.fence.check(proxy, epoch)
            assert caught.value.reason == STALE_LEADER
            assert caught.value.metadata["epoch"] == str(self.fence.epoch)
        else:
            self.fence.check(proxy, epoch)
            self._hear(epoch)
            self.done.append(epoch)

    @rule()
    def worker_is_started_again(self) -> None:
        self.fence = Fence(self.kept, self._keep)

    @invariant()
    def test_epochs_of_what_is_done_never_fall(self) -> None:
        done = getattr(self, "done", [])
        assert done == sorted(done)

    @invariant()
    def test_the_highest_epoch_is_kept_before_anything_is_done_by_it(self) -> None:
        if getattr(self, "done", []):
            assert self.kept == self.fence.epoch >= self.done[-1]

    def _keep(self, epoch: int) -> None:
        assert epoch > self.kept
        self.kept = epoch

    def _hear(self, epoch: int) -> None:
        self.heard.add(epoch)


TestLeaders = Leaders.TestCase


def test_a_proxy_without_leases_is_obeyed_unless_another_leads_by_one() -> None:
    fence = Fence()
    fence.check("old", 0)
    fence.hear("new", 3)
    assert fence.leader() == "new"
    with pytest.raises(PreconditionFailed):
        fence.check("old", 0)
    fence.hear("new", 0)
    assert fence.leader() == ""
    fence.check("old", 0)
    fence.hear("new", 4)
    fence.left("new")
    fence.check("old", 0)


def test_the_epoch_outlives_the_worker(tmp_path: Path) -> None:
    kept = EpochFile(tmp_path / "epoch")
    assert kept.read() == 0
    Fence(kept.read(), kept.write).check("a", 7)
    with pytest.raises(PreconditionFailed):
        Fence(kept.read(), kept.write).check("b", 6)
    (tmp_path / "epoch").write_text("seven")
    assert kept.read() == 0
    EpochFile(tmp_path / "nowhere" / "epoch").write(8)
    assert EpochFile(tmp_path / "nowhere" / "epoch").read() == 0
