"""Swaps under whatever may happen to them, each invariant with its name."""

import json
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.proxy.activation.machine import ActivationState
from helios.proxy.fleet.state import Replica, ReplicaState
from tests.proxy.support import GIB, MIB, entry
from tests.proxy.swap_world import S, SwapWorld, both


class SwapMachine(RuleBasedStateMachine):
    """A model with both forms beside another one that wants its room, through whatever may happen to a swap."""

    RARELY = st.sampled_from([False] * 5 + [True])

    def __init__(self) -> None:
        super().__init__()
        self.world = SwapWorld(both(), entry("cold"), memory_bytes=3 * GIB - MIB, idle_seconds=100.0)

    def pick(self, data: st.DataObject, *states: ReplicaState) -> Replica | None:
        found = sorted((r for r in self.world.replicas.values() if r.state in states), key=lambda r: r.replica_id)
        return data.draw(st.sampled_from(found)) if found else None

    @initialize(is_compiled=st.booleans())
    def begin(self, is_compiled: bool) -> None:
        compiled = self.world.serve()
        if is_compiled:
            self.world.become_ready(compiled)

    @rule(seconds=st.sampled_from([1, 5, 25]))
    def use(self, seconds: int) -> None:
        for _ in range(seconds):
            if not self.world.core.holds.count("m"):
                self.world.ask()
            self.world.pass_time(1)

    @rule(seconds=st.sampled_from([3, 70, 110]), happens=RARELY)
    def rest(self, seconds: int, happens: bool) -> None:
        self.world.pass_time(seconds if happens else 1)

    @rule(data=st.data(), is_acknowledged=st.booleans())
    def a_start_succeeds(self, data: st.DataObject, is_acknowledged: bool) -> None:
        item = self.pick(data, S.LOADING)
        if item is not None:
            self.world.become_ready(item, is_acknowledged=is_acknowledged)

    @rule(data=st.data(), happens=RARELY)
    def a_replica_fails(self, data: st.DataObject, happens: bool) -> None:
        item = self.pick(data, S.LOADING, S.READY) if happens else None
        if item is not None:
            self.world.fail(item, "REPLICA_DIED")

    @rule(data=st.data())
    def a_drain_ends(self, data: st.DataObject) -> None:
        item = self.pick(data, S.DRAINING)
        if item is not None:
            self.world.tell(replace(item, state=S.STOPPED))

    @rule()
    def envoy_acknowledges(self) -> None:
        self.world.acknowledge()

    @rule(happens=RARELY)
    def somebody_asks_for_the_other_model(self, happens: bool) -> None:
        if happens and not self.world.core.holds.count("cold"):
            self.world.ask("cold")

    @rule(happens=RARELY)
    def the_proxy_restarts(self, happens: bool) -> None:
        if happens:
            self.world.restart()

    @rule(
        happens=RARELY, compilation=st.sampled_from(["EAGER", "EAGER_THEN_COMPILED"]), tokens=st.sampled_from([64, 65])
    )
    def settings_change(self, happens: bool, compilation: str, tokens: int) -> None:
        if happens:
            document = {"compilation": f"COMPILATION_MODE_{compilation}", "max_batched_tokens": tokens}
            changed = both(engine_settings=json.dumps(document))
            self.world.models = (changed, entry("cold"))
            self.world.apply(self.world.core.model_upserted(changed, self.world.now))

    def going(self) -> list[Replica]:
        is_draining = self.world.core.traffic.is_draining
        return [item for item in self.world.core.fleet.replicas_of("m") if not is_draining(item)]

    @invariant()
    def test_a_model_has_at_most_one_spare(self) -> None:
        assert sum(item.is_spare for item in self.going()) <= 1

    @invariant()
    def test_requests_never_wait_for_a_spare_alone(self) -> None:
        if self.world.core.holds.count("m"):
            activation = self.world.core.lifecycle.activation("m")
            awaited = self.world.core.fleet.replica(activation.replica_id or "")
            assert awaited is None or not awaited.is_spare
            is_known_soon = any(item.state is S.READY for item in self.going())
            assert is_known_soon or activation.state in (ActivationState.STARTING, ActivationState.WAITING)

    @invariant()
    def test_a_spare_is_never_picked(self) -> None:
        assert not any(item.is_spare and self.world.core.traffic.is_candidate(item.replica_id) for item in self.going())


TestSwap = SwapMachine.TestCase
