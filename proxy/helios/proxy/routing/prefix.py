"""Which replica has the beginning of a prompt in its KV cache: what it was sent, less what it says that it lost.

An engine keeps the KV blocks of prompts that it has seen, and takes them again for a prompt that begins alike; so a
conversation's next turn, or a question after the same long system prompt, is answered sooner where the last one was.
The text of a prompt is cut into blocks; a block's hash is made of its bytes and the hash before, so that equal hashes
mean equal beginnings. For each replica the hashes of what it was sent are kept in the order of use, and an inverted
index says which replicas have a block: the bits of an int, one for each replica. A look takes one lookup and one AND a
block, however many replicas there are.

What an engine dropped it tells by the request whose prompt it was (``routing.corrections``), since nobody but this
process can make the hashes; so each block remembers the last prompt that had it. Where an engine tells nothing, its
evictions are guessed from its cache's size. Tokens are guessed from bytes in any case. A wrong guess costs a prefill,
as without. Pure.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NewType

from helios.proxy.routing.losses import Losses

Blocks = NewType("Blocks", tuple[int, ...])
"""The hashes of a prompt's blocks, first to last."""

NO_BLOCKS: Final = Blocks(())
BLOCK_BYTES: Final = 256
"""Some 64 tokens of English: four of vLLM's blocks. Smaller ones find little more and cost more."""
BLOCK_TOKENS: Final = 64
_MIN_BLOCKS: Final = 2
MIN_PROMPT_BYTES: Final = _MIN_BLOCKS * BLOCK_BYTES
"""A prompt that is shorter, and so one whose whole request is, has no blocks."""


def blocks_of(prompt: bytes, seed: str) -> Blocks:
    """Hashes a prompt's whole blocks; none of a prompt that is too short for its place to matter.

    ``seed`` is what makes equal prompts different for an engine's cache: an adapter, a salt. The hashes are this
    process's own (Python's SipHash with its secret), so that no client can make blocks collide.
    """
    count = len(prompt) // BLOCK_BYTES
    if count < _MIN_BLOCKS:
        return NO_BLOCKS
    value = hash(seed)
    hashes = []
    for begin, end in pairwise(range(0, count * BLOCK_BYTES + 1, BLOCK_BYTES)):
        value = hash((value, prompt[begin:end]))
        hashes.append(value)
    return Blocks(tuple(hashes))


@dataclass(slots=True, eq=False)
class _Sent:
    """A prompt that a replica was sent, and of how many of its blocks it is the last that had them.

    These are the ``count`` before ``end``: what a later prompt has, too, is a beginning, and what is dropped an end.
    ``blocks`` begin at ``offset``, which is 0 until the request has ended; the prompt had ``length``.
    """

    request_id: str
    blocks: Blocks
    count: int
    end: int
    length: int
    offset: int = 0
    has_ended: bool = False

    def shorten(self) -> None:
        """Remembers no more than the blocks that it is the last of."""
        first = self.end - self.count
        self.blocks = Blocks(self.blocks[first - self.offset : self.end - self.offset])
        self.offset = first


@dataclass(slots=True)
class _Held:
    """A replica's blocks, each with the last prompt that had it, the one used longest ago first; and these prompts."""

    bit: int
    capacity: int
    blocks: OrderedDict[int, _Sent] = field(default_factory=OrderedDict)
    sent: dict[str, _Sent] = field(default_factory=dict)


class PrefixIndex:
    """Which replica was sent which blocks, and has not said that it lost them.

    Invariants: a replica has at most its capacity, and its share of ``max_blocks``; the index holds exactly what
    replicas hold; no two replicas have a bit in common; the prompts that are remembered of a replica are those that
    are the last ones of at least one of its blocks, and by no other blocks once their requests have ended: else each
    question after a long beginning that all have in common would keep all of it.
    """

    def __init__(self, max_blocks: int) -> None:
        """``max_blocks`` bounds what is kept of all replicas; a block of one takes 215 bytes, or up to
        415 where prompts are of few blocks or replicas many.
        """
        self._max_blocks = max_blocks
        self.losses = Losses()
        self._held: dict[str, _Held] = {}
        self._replica_of: dict[int, str] = {}
        self._replicas_of: dict[int, int] = {}
        self._free_bits: list[int] = []

    @property
    def block_count(self) -> int:
        """Blocks of all replicas, each counted for each replica that has it."""
        return sum(len(held.blocks) for held in self._held.values())

    def match(self, blocks: Blocks) -> dict[str, int]:
        """How many of a prompt's first blocks each replica has; those that have none are left out."""
        found: dict[str, int] = {}
        having = self._replicas_of.get(blocks[0], 0) if blocks else 0
        for count, block in enumerate(blocks):
            still = having & self._replicas_of.get(block, 0)
            if still != having:
                self._note(found, having ^ still, count)
                having = still
            if not having:
                break
        self._note(found, having, len(blocks))
        return found

    def _note(self, found: dict[str, int], bits: int, count: int) -> None:
        while bits:
            lowest = bits & -bits
            found[self._replica_of[lowest]] = count
            bits ^= lowest

    def add(self, replica_id: str, request_id: str, blocks: Blocks, capacity: int) -> None:
        """A request's prompt was sent to a replica whose cache has room for ``capacity`` blocks."""
        held = self._held.get(replica_id)
        if held is None:
            held = self._held[replica_id] = _Held(self._new_bit(), capacity)
            self._replica_of[held.bit] = replica_id
        held.capacity = capacity
        self.ended(replica_id, request_id)
        count = min(len(blocks), capacity)
        sent = held.sent[request_id] = _Sent(request_id, blocks, count, count, len(blocks))
        shared: list[_Sent] = []
        bit, held_blocks, replicas_of = held.bit, held.blocks, self._replicas_of
        # The last first: a beginning is of use without its end, and an end is of none without its beginning.
        for block in reversed(blocks[:capacity]):
            before = held_blocks.get(block)
            held_blocks[block] = sent
            if before is None:
                replicas_of[block] = replicas_of.get(block, 0) | bit
            else:
                held_blocks.move_to_end(block)
                before.count -= 1
                if not before.count:
                    _forget_prompt(held, before)
                elif before.has_ended and (not shared or shared[-1] is not before):
                    shared.append(before)
        for before in shared:
            before.shorten()
        if self.losses.is_kept:
            # Whoever sent it believes that there was room for it.
            for block in blocks[capacity:]:
                self.losses.note(replica_id, block)
        self._evict(replica_id, held)

    def _evict(self, replica_id: str, held: _Held) -> None:
        """Drops the blocks used longest ago that are more than a replica may have."""
        share = max(1, self._max_blocks // len(self._held))
        dropped: list[_Sent] = []
        while len(held.blocks) > min(held.capacity, share):
            block, oldest = held.blocks.popitem(last=False)
            self._drop(held, block, oldest)
            if self.losses.is_kept:
                self.losses.note(replica_id, block)
            if not dropped or dropped[-1] is not oldest:
                dropped.append(oldest)
        for oldest in dropped:
            if oldest.has_ended:
                oldest.shorten()

    def keep(self, replica_id: str, request_id: str, ratio: float) -> int:
        """Of a request's prompt a replica has only the first part, a ``ratio`` of it; returns how many blocks it lost.

        What a later prompt has, too, stays: a loss that came after that one is told of it as well, and where it came
        before, the engine computed these blocks anew. A request that is not known lost nothing.
        """
        held = self._held.get(replica_id)
        sent = held.sent.get(request_id) if held is not None else None
        if held is None or sent is None:
            return 0
        lost_count = 0
        for block in sent.blocks[max(0, int(ratio * sent.length) - sent.offset) :]:
            if held.blocks.get(block) is sent:
                del held.blocks[block]
                self._drop(held, block, sent)
                lost_count += 1
                if self.losses.is_kept:
                    self.losses.note(replica_id, block)
        if sent.has_ended:
            sent.shorten()
        return lost_count

    def ended(self, replica_id: str, request_id: str) -> None:
        """A request needs its prompt's blocks no more: of those, its losses concern the ones that are its own."""
        held = self._held.get(replica_id)
        sent = held.sent.get(request_id) if held is not None else None
        if sent is not None:
            sent.has_ended = True
            sent.shorten()

    def sent(self, request_id: str) -> Blocks:
        """The blocks of the prompt of a request that was sent and has not ended. Looks at each replica."""
        found = (held.sent[request_id] for held in self._held.values() if request_id in held.sent)
        return next((sent.blocks for sent in found if not sent.has_ended), NO_BLOCKS)

    def forget(self, replica_id: str) -> None:
        """A replica is gone, or its cache is empty; harmless where nothing is known of it."""
        held = self._held.pop(replica_id, None)
        if self.losses.is_kept:
            # A gateway may know of prompts that it sent there and has not told of.
            self.losses.note(replica_id, None)
        if held is not None:
            for block, sent in held.blocks.items():
                self._drop(held, block, sent)
            del self._replica_of[held.bit]
            self._free_bits.append(held.bit)

    def _drop(self, held: _Held, block: int, sent: _Sent) -> None:
        sent.count -= 1
        sent.end -= 1
        if not sent.count:
            _forget_prompt(held, sent)
        left = self._replicas_of[block] & ~held.bit
        if left:
            self._replicas_of[block] = left
        else:
            del self._replicas_of[block]

    def _new_bit(self) -> int:
        return self._free_bits.pop() if self._free_bits else 1 << len(self._held)


def _forget_prompt(held: _Held, sent: _Sent) -> None:
    """A prompt is the last one of no block any more, so that its loss would say nothing; another may have its name."""
    if held.sent.get(sent.request_id) is sent:
        del held.sent[sent.request_id]
