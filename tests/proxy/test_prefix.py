"""Which replica has the beginning of a prompt: hashing, the index against a plain model of it, and the pick."""

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.proxy.fleet.state import Load
from helios.proxy.picker.prompt import NO_PROMPT, native_prompt, openai_prompt
from helios.proxy.routing.pick import MAX_CONSIDERED, Affinity, pick
from helios.proxy.routing.prefix import BLOCK_BYTES, NO_BLOCKS, Blocks, PrefixIndex, blocks_of
from helios.proxy.routing.table import Candidate, score

REPLICAS = ("a", "b", "c")
# Few texts of few blocks, so that they share beginnings.
PROMPTS = st.lists(st.sampled_from([b"x" * BLOCK_BYTES, b"y" * BLOCK_BYTES]), min_size=2, max_size=6).map(b"".join)


@given(PROMPTS, PROMPTS)
def test_equal_hashes_are_equal_beginnings(one: bytes, other: bytes) -> None:
    first, second = blocks_of(one, "s"), blocks_of(other, "s")
    for count in range(1, min(len(first), len(second)) + 1):
        is_same = one[: count * BLOCK_BYTES] == other[: count * BLOCK_BYTES]
        assert (first[count - 1] == second[count - 1]) is is_same
    assert not set(first) & set(blocks_of(one, "another salt"))


def test_only_whole_blocks_count_and_short_prompts_have_none() -> None:
    assert blocks_of(b"x" * (2 * BLOCK_BYTES - 1), "s") == NO_BLOCKS
    assert len(blocks_of(b"x" * (3 * BLOCK_BYTES - 1), "s")) == 2


def remembered(index: PrefixIndex) -> list[int]:
    """By how many blocks each prompt is remembered of which a loss would be understood: what takes memory."""
    return [len(sent.blocks) for held in index._held.values() for sent in held.sent.values()]


def texts(first: int, count: int) -> Blocks:
    """So many blocks that no other prompt of the test has."""
    return Blocks(tuple(range(first, first + count)))


def test_what_is_lost_of_a_prompt_that_has_ended_is_remembered_no_more() -> None:
    index = PrefixIndex(100)
    index.add("r", "a", texts(0, 4), 10)
    index.ended("r", "a")
    assert index.keep("r", "a", 0.5) == 2
    assert remembered(index) == [2]
    # Nor what its replica has no room for: of the one that was sent first, the end.
    index.add("r", "b", texts(10, 9), 10)
    index.ended("r", "b")
    assert remembered(index) == [1, 9]
    assert index.keep("r", "a", 0.0) == 1
    assert remembered(index) == [9]


class AgainstAPlainModel(RuleBasedStateMachine):
    """The index finds what a list of each replica's blocks, cut from the front, finds.

    Each block is listed with the number of the prompt that had it last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.max_blocks = 12
        self.index = PrefixIndex(self.max_blocks)
        self.model: dict[str, OrderedDict[int, int]] = {}
        self.sent: list[tuple[str, str, Blocks]] = []
        self.open: set[tuple[str, str]] = set()

    @rule(replica=st.sampled_from(REPLICAS), prompt=PROMPTS, capacity=st.integers(1, 8), reuses_its_name=st.booleans())
    def send(self, replica: str, prompt: bytes, capacity: int, *, reuses_its_name: bool) -> None:
        blocks = blocks_of(prompt, "s")
        name = self.sent[-1][1] if reuses_its_name and self.sent else f"r{len(self.sent)}"
        number = len(self.sent)
        self.sent.append((replica, name, blocks))
        self.open.add((replica, name))
        self.index.add(replica, name, blocks, capacity)
        held = self.model.setdefault(replica, OrderedDict())
        for block in reversed(blocks[:capacity]):
            held.pop(block, None)
            held[block] = number
        while len(held) > min(capacity, self.max_blocks // len(self.model)):
            held.popitem(last=False)

    @rule(replica=st.sampled_from(REPLICAS), data=st.data(), ratio=st.floats(0, 1))
    def lose(self, replica: str, data: st.DataObject, ratio: float) -> None:
        name = data.draw(st.sampled_from([name for _, name, _ in self.sent] or ["unknown"]))
        held = self.model.get(replica, OrderedDict())
        number = self._last_of(replica, name)
        blocks = self.sent[number][2] if number is not None else NO_BLOCKS
        lost = [block for block in blocks[int(ratio * len(blocks)) :] if held.get(block) == number]
        for block in lost:
            del held[block]
        assert self.index.keep(replica, name, ratio) == len(lost)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        replica, name, _ = data.draw(st.sampled_from(self.sent or [("a", "unknown", NO_BLOCKS)]))
        self.index.ended(replica, name)
        self.open.discard((replica, name))
        assert all(not self._is_open(name) or self.index.sent(name) in self._all_of(name) for _, name, _ in self.sent)

    def _is_open(self, name: str) -> bool:
        return any(one == name for _, one in self.open)

    def _all_of(self, name: str) -> list[Blocks]:
        """What a request's prompt may be, whole; nothing where a replica is the last of none of its blocks."""
        return [NO_BLOCKS, *(blocks for _, one, blocks in self.sent if one == name)]

    @invariant()
    def what_has_ended_is_remembered_by_its_own_blocks_alone(self) -> None:
        open_count = sum(len(blocks) for replica, name, blocks in self.sent if (replica, name) in self.open)
        assert sum(remembered(self.index)) <= self.index.block_count + open_count

    def _last_of(self, replica: str, name: str) -> int | None:
        """The number of the last prompt of this name that the replica was sent."""
        numbers = [number for number, sent in enumerate(self.sent) if sent[:2] == (replica, name)]
        return max(numbers, default=None)

    @rule(replica=st.sampled_from(REPLICAS))
    def forget(self, replica: str) -> None:
        self.index.forget(replica)
        self.model.pop(replica, None)

    @rule(prompt=PROMPTS)
    def ask(self, prompt: bytes) -> None:
        blocks = blocks_of(prompt, "s")
        expected = {replica: _leading(blocks, held) for replica, held in self.model.items()}
        assert self.index.match(blocks) == {replica: count for replica, count in expected.items() if count}

    @invariant()
    def it_holds_what_they_hold(self) -> None:
        assert self.index.block_count == sum(map(len, self.model.values()))

    @invariant()
    def it_remembers_the_prompts_that_were_the_last_of_a_block(self) -> None:
        numbers = [(replica, number) for replica, held in self.model.items() for number in set(held.values())]
        last = [1 for replica, number in numbers if self._last_of(replica, self.sent[number][1]) == number]
        assert len(remembered(self.index)) == len(last)


TestAgainstAPlainModel = AgainstAPlainModel.TestCase


def _leading(blocks: Blocks, held: OrderedDict[int, int]) -> int:
    return next((count for count, block in enumerate(blocks) if block not in held), len(blocks))


def test_a_beginning_that_all_have_in_common_is_remembered_once() -> None:
    index, beginning = PrefixIndex(10_000), bytes(range(256)) * 100
    for number in range(50):
        index.add("a", f"q{number}", blocks_of(beginning + bytes([number]) * BLOCK_BYTES, "s"), 10_000)
        index.ended("a", f"q{number}")
    assert len(remembered(index)) == 50
    assert sum(remembered(index)) == index.block_count == 150
    assert index.keep("a", "q7", 1.0) == 0
    assert index.keep("a", "q7", 100 / 101) == 1, "the ratio is of the whole prompt"
    assert index.keep("a", "q49", 0.5) == 51


def test_a_beginning_outlives_its_end() -> None:
    index = PrefixIndex(100)
    long = blocks_of(bytes(range(256)) * 6, "s")
    index.add("a", "r1", long, 6)
    index.add("a", "r2", blocks_of((b"other" * BLOCK_BYTES)[: 2 * BLOCK_BYTES], "s"), 6)
    assert index.match(long) == {"a": 4}


def _table(count: int, loads: dict[int, Load]) -> tuple[Candidate, ...]:
    return tuple(score(f"r{i}", f"a{i}", loads.get(i, Load()), 0) for i in range(count))


@given(st.integers(2, 3 * MAX_CONSIDERED), st.dictionaries(st.integers(0, 60), st.integers(1, 10)), st.data())
def test_the_picks_are_those_of_all_scores_together(count: int, held: dict[int, int], data: st.DataObject) -> None:
    waiting = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 9)))
    snapshot = _table(count, {index: Load(waiting_count=value) for index, value in waiting.items()})
    affinity = Affinity({f"r{index}": blocks for index, blocks in held.items()}, 10, 0.4)
    chosen = pick("m", "v", snapshot, affinity)
    assert chosen is not None
    best = sorted((affinity.rescored(candidate).score for candidate in snapshot), reverse=True)[:3]
    assert [choice.score for choice in chosen.choices] == best
    assert chosen.candidate_count == count


def test_a_cached_prompt_wins_until_requests_queue_there() -> None:
    affinity = Affinity({"r1": 10}, 10, 0.4)

    def first(load: Load) -> str:
        chosen = pick("m", "v", _table(2, {1: load}), affinity)
        assert chosen is not None
        return chosen.choices[0].replica_id

    assert first(Load(running_count=8, kv_usage_ratio=0.5)) == "r1"
    assert first(Load(running_count=64, waiting_count=4, kv_usage_ratio=0.9)) == "r0"


def test_what_a_conversation_adds_changes_no_block_before_it() -> None:
    system = {"role": "system", "content": "You are terse. " * 100}
    turns = [system, {"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "f" * 300}}]
    one = blocks_of(openai_prompt({"messages": turns}).text, "")
    more = [*turns, {"role": "assistant", "content": "Hi. " * 200}, {"role": "user", "content": "Bye"}]
    other = blocks_of(openai_prompt({"messages": more}).text, "")
    assert other[: len(one)] == one
    assert len(other) > len(one) > 2
    # Templates put tools first.
    assert not set(one) & set(blocks_of(openai_prompt({"messages": turns, "tools": tools}).text, ""))


def test_native_requests_have_their_prompt() -> None:
    messages = [pb.ChatMessage(role=pb.ChatMessage.ROLE_SYSTEM, content="s" * 600)]
    one = native_prompt(pb.ChatRequest(model="m", messages=messages)).text
    more = [*messages, pb.ChatMessage(role=pb.ChatMessage.ROLE_USER, content="u")]
    assert native_prompt(pb.ChatRequest(model="m", messages=more)).text.startswith(one)
    assert native_prompt(pb.CompleteRequest(text="é")).text == "é".encode()
    assert native_prompt(pb.CompleteRequest(token_ids=pb.TokenIds(ids=[1, 2]))).text
    assert native_prompt(pb.TokenizeRequest(text="x")) == NO_PROMPT


def test_odd_requests_have_no_prompt_and_break_nothing() -> None:
    odd: list[dict[str, object]] = [{}, {"messages": "x"}, {"messages": None, "prompt": 3}, {"prompt": {}}]
    for document in odd:
        assert openai_prompt(document) == NO_PROMPT
    assert openai_prompt({"prompt": [1, 2], "cache_salt": 3}).salt == ""
    assert openai_prompt({"prompt": "x", "cache_salt": "s"}) == (b'"x"', "s")
