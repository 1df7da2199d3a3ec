"""Weights in nodes' memory: what `Warmth` does about staging, over the scalable driver's nodes."""

from collections.abc import Callable, Sequence

from helios.proxy.warmth import WarmthPolicy
from tests.simulator.nodes import ModelState, Node, Nodes
from tests.simulator.world import Hardware, Stores


class Staging:
    """Stages; what was used longest ago gives way."""

    def __init__(
        self,
        policy: WarmthPolicy,
        hardware: Hardware,
        states: Sequence[ModelState],
        *,
        nodes: Nodes,
        stores: Stores,
        note: Callable[[float, str, ModelState, int], None],
    ) -> None:
        """``note`` is told of each."""
        self._policy = policy
        self._hardware = hardware
        self._states = states
        self._nodes = nodes
        self._stores = stores
        self._note = note

    def keep(self, state: ModelState, node: int, now: float, *, is_loaded: bool = True) -> None:
        """Stages a model whose last replica at a node goes or falls asleep; one that slept had no weights loaded."""
        if self._policy.stages and self._stage(state, self._nodes.all[node], now, may_evict=True):
            self._stores.stage(state.index, node, now, is_loaded=is_loaded)

    def stage_spare(self, state: ModelState, now: float) -> None:
        """Stages a model where most memory is free, if it is anywhere."""
        roomy = max(self._nodes.all, key=lambda node: node.free_host_bytes)
        if self._policy.stages and self._stage(state, roomy, now, may_evict=False):
            self._stores.stage(state.index, roomy.index, now, is_loaded=False)

    def settle(self, state: ModelState) -> None:
        """Stages a model, as if it had run, at one of the nodes that have it on disk."""
        for node in sorted(state.fetched):
            if not state.staged and self._stage(state, self._nodes.all[node], 0.0, may_evict=False):
                self._stores.stage(state.index, node, 0.0, is_loaded=True)

    def _stage(self, state: ModelState, node: Node, now: float, *, may_evict: bool) -> bool:
        size = state.model.entry.weights_bytes
        if node.index in state.staged or size > self._hardware.host_bytes:
            return False
        while may_evict and node.free_host_bytes < size and node.staged:
            oldest = min(node.staged, key=lambda index: self._states[index].last_wanted_at)
            node.free_host_bytes += node.staged.pop(oldest)
            self._states[oldest].staged.discard(node.index)
            self._stores.unstage(oldest, node.index)
        if node.free_host_bytes < size:
            return False
        node.staged[state.index] = size
        node.free_host_bytes -= size
        state.staged.add(node.index)
        self._note(now, "stage", state, node.index)
        return True
