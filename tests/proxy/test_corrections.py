"""What proxies believe of a replica's KV cache, against one that drops what it likes and tells it late, or never."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.api.fleet.v1 import types_pb2
from helios.proxy.core import Core
from helios.proxy.fleet.state import Load
from helios.proxy.fleet.wire import delta_from_proto
from helios.proxy.routing.corrections import Corrections, KvNews
from helios.proxy.routing.pick import Wishes
from helios.proxy.routing.prefix import Blocks, PrefixIndex
from helios.proxy.traffic import LoadDelta
from helios.worker.engines.vllm.kept_prompts import KeptPrompts
from helios.worker.replica.kv_losses import LossLog
from helios.worker.replica.loss_wire import losses_from_proto, losses_to_proto
from tests.proxy.support import core, entry, hello, replica

ROOM = 1_000
BLOCK_TOKENS = 16
# Few, so that prompts have beginnings in common and are sent again.
TEXTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=5).map("".join)


def blocks_of(text: str) -> Blocks:
    """A block a letter, named by all up to it."""
    return Blocks(tuple(hash(("s", text[:end])) for end in range(1, len(text) + 1)))


class Proxy:
    """What a proxy believes of one replica."""

    def __init__(self) -> None:
        self.index = PrefixIndex(ROOM)
        self.corrections = Corrections(self.index)

    def hear(self, news: KvNews) -> None:
        self.corrections.take("r", news)

    def believes(self, text: str) -> int:
        """How many of a text's blocks the replica has."""
        return self.index.match(blocks_of(text)).get("r", 0)


def told(log: LossLog, since: int) -> KvNews:
    """What a log says, through the contract's message."""
    message = types_pb2.LoadDelta(replica_id="r", kv_cache=losses_to_proto(log.since(since)))
    news = delta_from_proto(message).kv
    assert news is not None
    return news


class AgainstACache(RuleBasedStateMachine):
    """Two proxies, a supervisor and a replica whose cache drops blocks as it likes.

    Once everything has been told, nobody believes a replica to have what it has not, whatever was lost on the way.
    """

    @initialize(log_capacity=st.integers(1, 6), most_blocks=st.integers(1, 30))
    def begin(self, log_capacity: int, most_blocks: int) -> None:
        self.cache: set[str] = set()
        self.sent_count, self.most_blocks = 0, most_blocks
        self.kept = KeptPrompts(BLOCK_TOKENS, most_blocks, most_prompts=1_000)
        self.replica = LossLog(log_capacity)
        self.supervisor = LossLog(log_capacity)
        self.replica.note([])
        self.proxies = (Proxy(), Proxy())
        self.heard = [0, 0]
        self.supervisor_heard = 0

    @rule(text=TEXTS, which=st.integers(0, 1))
    def send(self, text: str, which: int) -> None:
        """A request is sent and computed, before or after what the proxy has not heard of yet."""
        self.sent_count += 1
        name = f"q{self.sent_count}"
        self.proxies[which].index.add("r", name, blocks_of(text), ROOM)
        self.kept.begin(name, keys(text), BLOCK_TOKENS * len(text) + 7)
        self.replica.note(self.kept.take())
        self.cache.update(keys(text))

    @rule(text=TEXTS, which=st.integers(0, 1))
    def leave(self, text: str, which: int) -> None:
        """A request is sent whose client leaves before its prompt is computed."""
        self.sent_count += 1
        name = f"q{self.sent_count}"
        self.proxies[which].index.add("r", name, blocks_of(text), ROOM)
        self.kept.begin(name, keys(text), BLOCK_TOKENS * len(text) + 7)
        self.kept.check(name, self.cache.__contains__)
        self.replica.note(self.kept.take())

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.cache:
            block = data.draw(st.sampled_from(sorted(self.cache)))
            self.cache.discard(block)
            self.kept.dropped(block)
            self.replica.note(self.kept.take())

    @rule()
    def empty(self) -> None:
        self.cache.clear()
        self.kept.clear()
        self.replica.emptied()

    @rule()
    def report(self) -> None:
        news = self.replica.since(self.supervisor_heard)
        self.supervisor_heard = news.sequence
        self.supervisor.take(losses_from_proto(losses_to_proto(news)))

    @rule(which=st.integers(0, 1))
    def hear(self, which: int) -> None:
        news = told(self.supervisor, self.heard[which])
        self.heard[which] = news.sequence
        self.proxies[which].hear(news)

    @rule(which=st.integers(0, 1))
    def miss(self, which: int) -> None:
        """A report is lost with its session."""
        self.heard[which] = self.supervisor.since(self.heard[which]).sequence

    @rule(which=st.integers(0, 1))
    def say_hello_again(self, which: int) -> None:
        self.heard[which] = 0

    @rule()
    def restart_supervisor(self) -> None:
        self.supervisor = LossLog(3)
        self.supervisor_heard = 0
        self.heard = [0, 0]

    @rule(text=TEXTS)
    def settle(self, text: str) -> None:
        """One more loss, so that a report that was missed shows."""
        self.send(text, 0)
        self.cache.discard(keys(text)[-1])
        self.kept.dropped(keys(text)[-1])
        self.replica.note(self.kept.take())
        self.report()
        for which in (0, 1):
            self.hear(which)
        for which, proxy in enumerate(self.proxies):
            assert self.heard[which] == self.replica.since(0).sequence
            for asked in all_texts():
                assert proxy.believes(asked) <= cached(self.cache, asked), asked

    @invariant()
    def what_is_followed_is_bounded(self) -> None:
        followed = {prompt.request_id for prompts in self.kept._blocks.values() for prompt in prompts}
        assert self.kept._prompts.keys() == followed, "a prompt is followed as long as a block names it"
        assert len(self.kept) <= max(self.most_blocks, 5)


def sent_to_one_of_two() -> Core:
    """A core with two replicas, of which one was picked for a request with a prompt, and sent it."""
    subject, model = core(), entry("m", min_replicas=2)
    subject.models_replaced([model], 0.0, is_synced=True)
    for number in (0, 1):
        held = replica(f"r{number}", worker_id=f"w{number}", address=f"127.0.0.1:{1000 + number}")
        subject.worker_hello(hello(held.worker_id, replicas=(held,)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    picked = subject.traffic.pick(model, "first", 0.0, None, Wishes(blocks_of("ab")))
    assert picked is not None
    assert picked.choices[0].replica_id == "r0"
    subject.traffic.prompt_sent(model, "r0", "first", blocks_of("ab"))
    return subject


def prefix_scores(subject: Core) -> set[float]:
    """What the replicas' caches count for in a pick for the same prompt."""
    picked = subject.traffic.pick(entry("m"), "next", 0.0, None, Wishes(blocks_of("ab")))
    assert picked is not None
    return {choice.prefix_score for choice in picked.choices}


def test_the_prompt_of_an_answer_that_may_go_on_elsewhere_is_known_until_it_has_ended() -> None:
    subject = sent_to_one_of_two()
    subject.load_report([LoadDelta("r0", Load(), started=("first",), finished=(("first", 14),))], 1.0)
    assert subject.traffic.prompt_of("first") == blocks_of("ab")
    subject.load_report([LoadDelta("r0", Load(), finished=(("first", 0),))], 2.0)
    assert subject.traffic.prompt_of("first") == ()
    assert prefix_scores(subject) == {0.0, 1.0}, "the replica has it still"


def test_a_prompt_that_envoy_could_not_bring_anywhere_is_not_believed_in() -> None:
    subject = sent_to_one_of_two()
    subject.unreached("first", 1.0, address="", is_failure=True)
    assert prefix_scores(subject) == {0.0}


def test_a_prompt_that_arrived_is_believed_in_until_its_replica_says_otherwise() -> None:
    subject = sent_to_one_of_two()
    subject.load_report([LoadDelta("r0", Load(running_count=1), started=("first",), kv=KvNews(0, 0))], 1.0)
    subject.traffic.tick(1000.0)
    assert prefix_scores(subject) == {0.0, 1.0}
    subject.load_report([LoadDelta("r0", Load(), kv=KvNews(1, 0, (("somebody else's", 0.0), ("first", 0.5))))], 1001.0)
    assert prefix_scores(subject) == {0.0, 0.5}
    subject.load_report([LoadDelta("r0", Load(), kv=KvNews(9, 9))], 1002.0)
    assert prefix_scores(subject) == {0.0}
    tally = subject.traffic.corrections.take_tally()
    assert (tally.losses, tally.blocks, tally.emptied) == (1, 1, 1)


def test_a_prompt_that_never_arrived_is_not_believed_in() -> None:
    subject = sent_to_one_of_two()
    subject.traffic.tick(1000.0)
    assert prefix_scores(subject) == {0.0}
    subject = sent_to_one_of_two()
    # Envoy could not reach the one that it was to go to.
    subject.load_report([LoadDelta("r1", Load(running_count=1), started=("first",))], 1.0)
    assert prefix_scores(subject) == {0.0}


def test_a_cache_whose_losses_are_told_may_hold_more_than_was_guessed() -> None:
    corrections = Corrections(PrefixIndex(ROOM))
    assert corrections.room("r", 100) == 100
    corrections.take("r", KvNews(0, 0))
    assert corrections.room("r", 100) == 200
    corrections.forget("r")
    assert corrections.room("r", 100) == 100


def keys(text: str) -> tuple[str, ...]:
    """The keys of the engine's blocks: as long as the proxy's here."""
    return tuple(text[:end] for end in range(1, len(text) + 1))


def cached(cache: set[str], text: str) -> int:
    """How many of a text's first blocks are in a cache."""
    return next((count for count, key in enumerate(keys(text)) if key not in cache), len(text))


def all_texts() -> list[str]:
    """All texts of five letters; what is believed of a shorter one is believed of these."""
    return [format(number, "05b").replace("0", "a").replace("1", "b") for number in range(32)]


TestAgainstACache = AgainstACache.TestCase
TestAgainstACache.settings = settings(stateful_step_count=40, deadline=None)
