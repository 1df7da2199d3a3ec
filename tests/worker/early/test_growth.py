"""What a load may read while its model is fetched, and whether it counts: every order of what can happen."""

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.storage.early.watching import GrowingFile, Growth
from helios.worker.early.growth import EarlyGrowth, needs_every_header, suits
from helios.worker.replica.settings import EngineSettings, SpeculativeDecoding

SIZE = 100
CONFIG = GrowingFile("config.json", "/b/config", 10, ((0, 10),))
EMPTY = GrowingFile("empty.txt", "/b/empty", 0, ())
DRAFT = SpeculativeDecoding(token_count=2, method="draft_model", draft_model="d", draft_revision="sha256:" + "0" * 64)


def growing(*spans: tuple[int, int], path: str = "model.safetensors", generation: int = 1) -> GrowingFile:
    return GrowingFile(path, f"/partial/{path}", SIZE, spans, generation)


def taken(*files: GrowingFile, awaited: tuple[str, ...] = ()) -> EarlyGrowth:
    growth = EarlyGrowth()
    growth.take(Growth(files, awaited))
    return growth


@pytest.mark.parametrize(
    ("growth", "may_begin"),
    [
        (taken(CONFIG, EMPTY, growing((0, 8))), True),
        (taken(CONFIG, awaited=("model.safetensors",)), True),
        (taken(CONFIG, growing((0, SIZE)), growing((0, 8), path="model-2.safetensors")), True),
        (taken(CONFIG, growing((0, SIZE))), False),
        (taken(CONFIG, growing((0, 8)), awaited=("tokenizer.json",)), False),
        (taken(CONFIG, growing((0, 8)), GrowingFile("tokenizer.json", "/p", 10, ((0, 9),), 2)), False),
        (taken(CONFIG, growing((0, 8)), awaited=("1_Dense/model.safetensors",)), False),
        (taken(CONFIG, growing((0, 8), path="consolidated.safetensors")), False),
        (taken(growing((0, 8))), False),
        (taken(CONFIG), False),
        (taken(), False),
    ],
    ids=["some", "none", "one of two", "all", "tokenizer awaited", "tokenizer grows", "in a folder", "mistral",
         "no config", "no weights", "nothing told"],
)  # fmt: skip
def test_a_start_begins_when_all_but_weights_is_here(growth: EarlyGrowth, may_begin: bool) -> None:
    assert growth.may_begin is may_begin


def test_only_engines_that_wait_for_each_tensor_load_early() -> None:
    plain = EngineSettings()
    assert suits("vllm", plain)
    assert not any(suits(engine, plain) for engine in ("transformers", "simulated", "custom:m:C"))
    assert not suits("vllm", EngineSettings(speculative_decoding=DRAFT))


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        ({"dtype": "bfloat16", "tie_word_embeddings": False}, False),
        ({"text_config": {"torch_dtype": "float16"}, "tie_word_embeddings": False}, False),
        ({"dtype": "bfloat16", "tie_word_embeddings": True}, True),
        ({"dtype": "bfloat16"}, True),
        ({"tie_word_embeddings": False}, True),
        ({"text_config": 7, "tie_word_embeddings": False}, True),
    ],
)
def test_headers_are_waited_for_where_the_configuration_leaves_something_to_them(
    config: dict[str, object], needs: bool
) -> None:
    assert needs_every_header(config) is needs


@pytest.mark.parametrize(
    "then",
    [
        lambda growth: growth.take(Growth((growing((0, 4)),))),
        lambda growth: growth.take(Growth((growing((0, 60), generation=2),))),
        lambda growth: growth.break_off(),
        lambda growth: growth.lend(is_same=False),
    ],
    ids=["less", "begun anew", "nobody tells", "other files"],
)
def test_what_was_loaded_of_a_fetch_that_is_not_the_one_that_is_lent_does_not_count(
    then: Callable[[EarlyGrowth], None],
) -> None:
    late, early = taken(growing((0, 50))), taken(growing((0, 50)))
    late.has_begun = early.has_begun = True
    assert late.note_loaded()
    then(late)
    assert (late.is_lost, late.counts) == (True, False)
    # A load that learns of it in time loads again, what is lent.
    then(early)
    assert not early.note_loaded()
    assert early.counts


def test_a_file_that_is_whole_has_another_place_and_no_fetch_of_its_own_any_more() -> None:
    growth = taken(growing((0, 50)))
    growth.take(Growth((), ("model.safetensors",)))
    growth.take(Growth((GrowingFile("model.safetensors", "/blobs/x", SIZE, ((0, SIZE),)),)))
    assert not growth.is_lost
    assert growth.covers("model.safetensors", 0, SIZE)


class EarlyLoadLives(RuleBasedStateMachine):
    """A storage agent that fetches one file, may begin anew in another, and may go away; a load that reads what it may.

    Not all that happens is told, and the load sees the file that was there when it was first told of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.growth = EarlyGrowth()
        self.growth.has_begun = True
        self.try_number, self.end = 1, 0
        self.shown_try: int | None = None
        self.told_end = 0
        self.has_read = self.has_loaded = False
        self.version = self.growth.version

    def tell(self) -> None:
        if not self.end:
            self.growth.take(Growth((), ("w.safetensors",)))
            return
        self.shown_try = self.shown_try or self.try_number
        self.growth.take(Growth((growing((0, self.end), path="w.safetensors", generation=self.try_number),)))
        if self.try_number == self.shown_try:
            self.told_end = self.end

    @rule(count=st.integers(1, 40), is_told=st.booleans())
    def bytes_come(self, count: int, is_told: bool) -> None:
        self.end = min(SIZE, self.end + count)
        if is_told:
            self.tell()

    @precondition(lambda self: not self.growth.is_lent)
    @rule(count=st.integers(0, SIZE))
    def it_begins_anew(self, count: int) -> None:
        self.try_number, self.end = self.try_number + 1, count

    @rule()
    def the_watch_breaks(self) -> None:
        self.growth.break_off()

    @precondition(lambda self: not self.has_loaded and not self.growth.is_lost and not self.growth.is_lent)
    @rule(start=st.integers(0, SIZE - 1), length=st.integers(1, 30))
    def a_tensor_is_read(self, start: int, length: int) -> None:
        end = min(SIZE, start + length)
        if self.growth.covers("w.safetensors", start, end):
            self.has_read = True
            assert end <= self.told_end, "no byte is read that was not told to be in that very file"

    @precondition(lambda self: not self.has_loaded)
    @rule()
    def the_load_ends(self) -> None:
        self.has_loaded = self.growth.note_loaded()

    @precondition(lambda self: not self.growth.is_lent)
    @rule(is_told=st.booleans())
    def it_is_lent(self, is_told: bool) -> None:
        self.end = SIZE
        if is_told:
            self.tell()
        self.growth.lend(is_same=self.shown_try in (None, self.try_number))

    @invariant()
    def what_counts_was_read_of_the_file_that_is_lent(self) -> None:
        if self.growth.is_lent and self.has_loaded and self.has_read and self.growth.counts:
            assert self.shown_try == self.try_number

    @invariant()
    def versions_only_grow(self) -> None:
        assert self.growth.version >= self.version
        self.version = self.growth.version


TestEveryOrderOfAnEarlyLoad = EarlyLoadLives.TestCase
