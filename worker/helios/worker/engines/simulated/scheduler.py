"""Continuous batching over a limited number of KV blocks, the way vLLM's scheduler does it. Pure: no clock, no tasks.

Each step computes tokens for some sequences: whole prompts or parts of them, and one token for each answer that is
under way. Sequences begin in the order that is said of them, else that of their arrival. One that needs a block when
none is free takes those of the youngest running one, which goes back to the head of the queue and is computed anew
later, its answer so far included.

Invariants (a hypothesis machine holds them): blocks in use and free blocks add up to the capacity; no more sequences
run than the batch holds; no step computes more tokens than it may; whatever is added ends, if each sequence alone fits.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a scheduler has: sequences at once, tokens in a step, KV blocks, and tokens of a block."""

    max_batch: int
    max_batched_tokens: int
    block_count: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes.

    Attributes:
        tokens: Sequence → how many of its tokens.
        prefill_tokens: Tokens of prompts, and of answers that are computed anew.
        decode_count: Sequences that only add a token to their answer.
        preempted: Sequences that lost their blocks.
    """

    tokens: Mapping[int, int]
    prefill_tokens: int
    decode_count: int
    preempted: tuple[int, ...]


@dataclass(slots=True)
class _Sequence:
    key: int
    total: int
    """Tokens of the prompt and of the answer so far."""
    order: int = 0
    computed: int = 0
    blocks: int = 0
    is_begun: bool = False


class Scheduler:
    """Decides what each step computes. Call ``plan``, let the step's time pass, call ``complete``, and so on."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._free = capacity.block_count
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()

    @property
    def running_count(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Sequences that hold none."""
        return len(self._waiting)

    @property
    def usage_ratio(self) -> float:
        """Share of the blocks in use."""
        return 1 - self._free / self._capacity.block_count

    def add(self, key: int, prompt_tokens: int, order: int = 0) -> None:
        """Queues a sequence behind those of a lower or the same order. ``key`` is unique among those that are here."""
        index = len(self._waiting)
        # What was begun before stays at the head.
        while index and order < self._waiting[index - 1].order and not self._waiting[index - 1].is_begun:
            index -= 1
        self._waiting.insert(index, _Sequence(key, prompt_tokens, order=order))

    def remove(self, key: int) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks. Does nothing where it is not here."""
        for sequence in self._running:
            if sequence.key == key:
                self._release(sequence)
                self._running.remove(sequence)
                return
        self._waiting = deque(sequence for sequence in self._waiting if sequence.key != key)

    def plan(self) -> Step | None:
        """Returns what to compute next; None where there is nothing to do."""
        tokens: dict[int, int] = {}
        preempted: list[int] = []
        budget = self._capacity.max_batched_tokens
        for sequence in tuple(self._running):
            wanted = min(sequence.total - sequence.computed, budget)
            if wanted and sequence in self._running and self._make_room(sequence, wanted, preempted):
                tokens[sequence.key] = wanted
                budget -= wanted
        while self._waiting and budget and not preempted and len(self._running) < self._capacity.max_batch:
            sequence = self._waiting[0]
            wanted = min(sequence.total, budget)
            if not self._take(sequence, wanted):
                break
            self._running.append(self._waiting.popleft())
            tokens[sequence.key] = wanted
            budget -= wanted
        decoding = [s for s in self._running if s.is_begun and tokens.get(s.key) == 1 and s.computed == s.total - 1]
        prefill_tokens = sum(tokens.values()) - len(decoding)
        return Step(tokens, prefill_tokens, len(decoding), tuple(preempted)) if tokens else None

    def complete(self, step: Step) -> list[int]:
        """Notes that a step was computed; returns the sequences that got a token, in the order of their arrival."""
        made = []
        for sequence in self._running:
            sequence.computed += step.tokens.get(sequence.key, 0)
            if sequence.computed == sequence.total:
                sequence.total += 1
                sequence.is_begun = True
                made.append(sequence.key)
        return made

    def _make_room(self, sequence: _Sequence, tokens: int, preempted: list[int]) -> bool:
        """Takes blocks for more tokens, from the youngest where none are free; False where it was the youngest."""
        while not self._take(sequence, tokens):
            youngest = self._running.pop()
            self._release(youngest)
            youngest.computed = 0
            self._waiting.appendleft(youngest)
            preempted.append(youngest.key)
            if youngest is sequence:
                return False
        return True

    def _take(self, sequence: _Sequence, tokens: int) -> bool:
        needed = -(-(sequence.computed + tokens) // self._capacity.block_tokens) - sequence.blocks
        if needed > self._free:
            return False
        self._free -= needed
        sequence.blocks += needed
        return True

    def _release(self, sequence: _Sequence) -> None:
        self._free += sequence.blocks
        sequence.blocks = 0
