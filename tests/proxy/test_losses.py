"""What gateways that pick by themselves are told of caches: they believe no more than the proxy does, for long."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from helios.proxy.routing.losses import HASH_END, Losses
from helios.proxy.routing.prefix import Blocks, PrefixIndex

REPLICAS = st.sampled_from(["r", "s"])
GATEWAYS = st.integers(0, 1)
TEXTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=5).map("".join)
KEPT_COUNT, TOLD_COUNT, CAPACITY = 12, 6, 4


def blocks_of(text: str) -> Blocks:
    """A block a letter, named by all up to it."""
    return Blocks(
        tuple(int("1" + text[:end].replace("a", "0").replace("b", "1"), 2) for end in range(1, len(text) + 1))
    )


@dataclass
class Gateway:
    """What it believes, what it has not told, up to where it has heard, and what really was lost since."""

    believed: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    untold: list[tuple[str, str, Blocks]] = field(default_factory=list)
    sequence: int = 0
    lost: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    emptied: set[str] = field(default_factory=set)

    def begin_anew(self, sequence: int) -> None:
        self.sequence = sequence
        self.lost.clear()
        self.emptied.clear()


class AgainstGateways(RuleBasedStateMachine):
    """Two gateways, and an index that forgets what it likes.

    Who has told all and heard all believes nothing that the index does not, and is told of nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(1_000)
        self.index.losses = Losses(KEPT_COUNT, TOLD_COUNT)
        self.gateways = [Gateway(), Gateway()]
        self.request_count = 0
        self.sent: list[tuple[str, str]] = []

    def held(self) -> dict[str, set[int]]:
        return {replica_id: set(held.blocks) for replica_id, held in self.index._held.items()}

    def happens(self, change: Callable[[], object], added: tuple[str, Blocks] | None = None) -> None:
        """Something happens to the index; what that loses is noted here by itself."""
        before = self.held()
        change()
        after = self.held()
        if added is not None:
            # What it has no room for is lost as soon as it comes.
            before.setdefault(added[0], set()).update(added[1])
        for gateway in self.gateways:
            for replica_id, blocks in before.items():
                gateway.lost[replica_id] |= blocks - after.get(replica_id, set())

    def add(self, replica_id: str, request_id: str, blocks: Blocks) -> None:
        self.happens(lambda: self.index.add(replica_id, request_id, blocks, CAPACITY), (replica_id, blocks))
        self.sent.append((replica_id, request_id))

    @rule(replica_id=REPLICAS, text=TEXTS)
    def the_picker_sends(self, replica_id: str, text: str) -> None:
        self.request_count += 1
        self.add(replica_id, f"q{self.request_count}", blocks_of(text))

    @precondition(lambda self: any(gateway.sequence for gateway in self.gateways))
    @rule(number=GATEWAYS, replica_id=REPLICAS, text=TEXTS)
    def a_gateway_sends(self, number: int, replica_id: str, text: str) -> None:
        gateway = self.gateways[number]
        if gateway.sequence:
            self.request_count += 1
            gateway.believed[replica_id] |= set(blocks_of(text))
            gateway.untold.append((replica_id, f"q{self.request_count}", blocks_of(text)))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), ratio=st.floats(0, 1))
    def an_engine_drops(self, data: st.DataObject, ratio: float) -> None:
        replica_id, request_id = data.draw(st.sampled_from(self.sent))
        self.happens(lambda: self.index.keep(replica_id, request_id, ratio))

    @rule(replica_id=REPLICAS)
    def a_replica_sleeps(self, replica_id: str) -> None:
        self.happens(lambda: self.index.forget(replica_id))
        for gateway in self.gateways:
            gateway.emptied.add(replica_id)

    @rule(number=GATEWAYS, replica_ids=st.sampled_from([{"r", "s"}, {"r"}]))
    def test_who_has_told_all_and_heard_all_believes_what_the_index_does(
        self, number: int, replica_ids: set[str]
    ) -> None:
        gateway, losses = self.gateways[number], self.index.losses
        for replica_id, request_id, blocks in gateway.untold:
            self.add(replica_id, request_id, blocks)
            self.index.ended(replica_id, request_id)
        gateway.untold.clear()
        losses.is_kept = True
        if not gateway.sequence:
            gateway.begin_anew(losses.sequence)
            return
        told = losses.since(gateway.sequence, replica_ids)
        if told is None:
            assert losses.sequence - gateway.sequence > min(KEPT_COUNT, TOLD_COUNT), "as much as that is told"
            gateway.believed.clear()
        else:
            assert told.keys() <= replica_ids
            assert sum(map(len, told.values())) <= TOLD_COUNT
            self.check(gateway, told, replica_ids)
            for replica_id, lost in told.items():
                gateway.believed[replica_id] = gateway.believed[replica_id].difference(lost) if lost else set()
        for replica_id in replica_ids:
            assert gateway.believed[replica_id] <= self.held().get(replica_id, set())
        # The model has no such replica any more: nothing is told of it, and nothing is sent there.
        for replica_id in {"r", "s"} - replica_ids:
            gateway.believed[replica_id].clear()
        gateway.begin_anew(losses.sequence)

    def check(self, gateway: Gateway, told: dict[str, list[int]], replica_ids: set[str]) -> None:
        emptied = {replica_id for replica_id, blocks in told.items() if not blocks}
        assert emptied == gateway.emptied & replica_ids
        for replica_id in replica_ids - emptied:
            assert set(told.get(replica_id, ())) == gateway.lost[replica_id]


def test_nobody_is_told_of_what_was_lost_before_anybody_asked() -> None:
    index = PrefixIndex(100)
    for number in range(20):
        index.add("r", str(number), blocks_of("ab" * 2), 3)
        index.forget("r")
    assert index.losses.sequence == 1
    assert index.losses.since(1, {"r"}) == {}


def test_who_has_heard_of_another_process_forgets_all() -> None:
    losses = Losses()
    assert losses.since(5, {"r"}) is None
    losses.note("r", 7)
    assert losses.since(1, {"r"}) == {"r": [7]}
    assert losses.since(1, {"other"}) == {}
    assert losses.since(0, {"r"}) is None


def test_only_what_gateways_hash_is_told() -> None:
    losses = Losses()
    for block in (-1, HASH_END, 1 << 63):
        losses.note("r", block)
    assert losses.since(1, {"r"}) == {}
    losses.note("r", HASH_END - 1)
    losses.note("r", None)
    assert losses.since(1, {"r"}) == {"r": []}, "everything is said by no block"


TestGateways = AgainstGateways.TestCase
