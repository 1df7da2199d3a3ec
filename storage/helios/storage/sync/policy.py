"""Which chunk of a blob next, and from whom: rarest first, the cloud for what nobody has. Pure.

A chunk may be read from a peer that has it, or from the cloud once this node has claimed it. Half of the reads go to
the cloud while there is something to get from peers as well: what only this node fetches is the rarest of all, and what
peers have keeps their links busy meanwhile. Nothing waits for ever: a peer that lies or stalls is dropped, one that
fails rests and is dropped after three failures, a chunk that three reads from peers did not bring is read from the
cloud, and so is everything when for some time there was nothing to do, whoever should have brought it.
"""

import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from helios.mesh.transfer.spans import Span, Spans

STORE: Final = ""
"""The cloud among the sources; peers are named by their addresses."""

_MAX_FAILURES: Final = 3
"""In a row, each after a rest; then a peer is dropped for the rest of the transfer. Of one chunk: then the cloud."""

_REST_SECONDS: Final = 0.5
"""After a first failure; twice as long after each further one."""

_MAX_ASKED_REST_SECONDS: Final = 2.0
"""A peer that asks for more patience is asked again all the same, and dropped in the end: it is not waited for."""

_REFUSED_SECONDS: Final = 0.25
"""After a claim that brought nothing: others are at it."""

_CLAIM_SECONDS: Final = 20.0
"""A claim that was not begun by then goes back, before the registry takes it (60 s)."""

_STARVED_SECONDS: Final = 30.0
"""Without anything to do: longer than a stalled read of a peer takes to be noticed (20 s)."""

_SILENT_SECONDS: Final = 2.0
"""How long a new peer may take to say what it has before something is read from the cloud."""

_UNREACHED_SECONDS: Final = 3.0
"""A peer that does not say what it has for so long is none to wait for."""


@dataclass(slots=True)
class _Peer:
    node: str
    is_whole: bool
    silent_until: float
    """It has not said yet what it has, and is waited for until then."""
    spans: Spans = field(default_factory=Spans)
    reads: int = 0
    begun_count: int = 0
    failures: int = 0
    rests_until: float = 0.0
    is_dropped: bool = False
    unreached_since: float | None = None

    def has(self, span: Span) -> bool:
        return self.is_whole or self.spans.covers(*span)


@dataclass(frozen=True, slots=True)
class Asked:
    """A claim to make: spans, the most urgent first, how many of them, and nodes that are of no use."""

    spans: tuple[Span, ...]
    limit: int
    excluded_nodes: frozenset[str]


class SwarmPolicy:
    """Chooses for one transfer. Not thread-safe. Times are of the monotonic clock."""

    def __init__(self, *, parallel: int, salt: int, now: float) -> None:
        """Takes how many reads there are at a time, and a number that differs between nodes: among chunks that are
        equally rare each begins with another one.
        """
        self._parallel = parallel
        self._salt = salt
        self._peers: dict[str, _Peer] = {}
        self._claims: dict[Span, float] = {}
        self._reading: dict[int, tuple[Span, str]] = {}
        self._peer_failures: Counter[Span] = Counter()
        self._asked: Asked | None = None
        self._is_asking = False
        self._ask_after = 0.0
        self._fed_at = now
        # Once there was nothing to do for too long, whatever others have or claim counts for nothing any more.
        self._is_distrustful = False
        # Until somebody said who else there is, nobody is asked for anything.
        self._has_met = False

    def meet(self, peers: Iterable[tuple[str, str, bool]], now: float) -> list[str]:
        """Takes all who hold the blob: address, node, whether they have all of it. Returns the new ones' addresses."""
        told = {address: (node, is_whole) for address, node, is_whole in peers}
        for address in self._peers.keys() - told.keys():
            # What was just read from it may go on; it is asked for nothing more.
            self._peers[address].is_whole, self._peers[address].spans = False, Spans()
        self._has_met = True
        return self.meet_more(((address, *rest) for address, rest in told.items()), now)

    def meet_more(self, peers: Iterable[tuple[str, str, bool]], now: float) -> list[str]:
        """Takes some more who hold the blob; returns the new ones' addresses."""
        new: list[str] = []
        for address, node, is_whole in peers:
            if address not in self._peers:
                self._peers[address] = _Peer(node, is_whole, now if is_whole else now + _SILENT_SECONDS)
                new.append(address)
            elif is_whole:
                self._peers[address].is_whole = True
        return new

    def has(self, address: str, spans: Iterable[Span], *, is_whole: bool) -> None:
        """A peer says what it has."""
        if (peer := self._peers.get(address)) is not None:
            peer.is_whole, peer.spans, peer.unreached_since = is_whole, Spans(spans), None
            peer.silent_until = 0.0

    def unreached(self, address: str, now: float) -> None:
        """A peer did not say what it has."""
        if (peer := self._peers.get(address)) is not None and peer.unreached_since is None:
            peer.unreached_since, peer.silent_until = now, 0.0

    def choose(self, chunks: Sequence[Span], now: float) -> tuple[int, str] | None:
        """The place of the chunk to begin with, and its source; None: nothing can be read now.

        What is chosen counts as being read until `ended`.
        """
        choice = self._choose(chunks, now)
        if choice is None and not self._reading and now - self._fed_at >= _STARVED_SECONDS:
            choice, self._is_distrustful = (0, STORE), True
        self._plan_claim(chunks, now)
        if choice is not None:
            self._fed_at = now
            place, source = choice
            self._claims.pop(chunks[place], None)
            self._reading[chunks[place][0]] = chunks[place], source
            if source != STORE:
                self._peers[source].reads += 1
                self._peers[source].begun_count += 1
        return choice

    def source_of(self, offset: int) -> tuple[Span, str] | None:
        """What the read of a chunk that has this byte was chosen to be."""
        return next((read for read in self._reading.values() if read[0][0] <= offset < read[0][1]), None)

    def ended(self, start: int) -> None:
        """The chunk that begins here came, or its read ended for a reason that is not the source's."""
        read = self._reading.pop(start, None)
        if read is not None and read[1] != STORE:
            peer = self._peers[read[1]]
            peer.reads -= 1

    def succeeded(self, start: int, now: float) -> None:
        """The chunk that begins here came."""
        self._fed_at = now
        read = self._reading.get(start)
        if read is not None:
            # Claimed while a peer was read from already.
            self._claims.pop(read[0], None)
            if read[1] != STORE:
                self._peers[read[1]].failures = 0
        self.ended(start)

    def failed(
        self,
        start: int,
        now: float,
        *,
        is_dropped: bool = False,
        has_nothing: bool = False,
        rest_seconds: float = 0.0,
    ) -> Span | None:
        """The read of the chunk that begins here failed by its source's fault. Returns the span if that was claimed.

        Args:
            start: The chunk's first byte.
            now: When that is.
            is_dropped: The source lied or stalled: it is asked for nothing more.
            has_nothing: The source does not have what it said it had.
            rest_seconds: How long a peer asks to be left alone; others are read meanwhile.
        """
        read = self._reading.get(start)
        if read is None:
            return None
        span, source = read
        self.ended(start)
        if source == STORE:
            return span
        self._peer_failures[span] += 1
        peer = self._peers[source]
        if has_nothing:
            peer.is_whole, peer.spans = False, Spans()
        if is_dropped:
            peer.is_dropped = True
        elif now >= peer.rests_until:
            # Of several reads that were under way when it failed, one counts.
            peer.failures += 1
            own_seconds = _REST_SECONDS * 2.0 ** (peer.failures - 1)
            peer.rests_until = now + max(own_seconds, min(rest_seconds, _MAX_ASKED_REST_SECONDS))
            peer.is_dropped = peer.failures >= _MAX_FAILURES
        return None

    def take_asked(self) -> Asked | None:
        """The claim that is to be made now; until `answered` there is no other."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self._is_asking = True
        return asked

    def answered(self, granted: Collection[Span], now: float) -> None:
        """The answer to a claim; nothing where it was refused."""
        self._is_asking = False
        self._claims.update((span, now) for span in granted)
        if not granted:
            self._ask_after = now + _REFUSED_SECONDS

    def take_old_claims(self, now: float) -> list[Span]:
        """Claims that were not begun for too long: they are to be given back."""
        old = [span for span, at in self._claims.items() if now - at >= _CLAIM_SECONDS]
        for span in old:
            del self._claims[span]
        return old

    def is_alone(self) -> bool:
        """Whether there is nobody else to read from."""
        return all(peer.is_dropped for peer in self._peers.values())

    def _choose(self, chunks: Sequence[Span], now: float) -> tuple[int, str] | None:
        awake = [(a, p) for a, p in self._peers.items() if not p.is_dropped and p.rests_until <= now]
        store_reads = sum(source == STORE for _, source in self._reading.values())
        own = next((i for i, c in enumerate(chunks) if self._is_own(c)), None)
        shared = [(i, owners) for i, c in enumerate(chunks) if (owners := [(a, p) for a, p in awake if p.has(c)])]
        if own is not None and (not shared or store_reads < max(1, self._parallel // 2)):
            return own, STORE
        if not shared:
            return None
        is_crowd = len(awake) > 1
        place, owners = min(
            shared, key=lambda item: (len(item[1]), self._mix(chunks[item[0]][0]) if is_crowd else 0, item[0])
        )
        # In turns, where they are equally busy.
        address, _ = min(owners, key=lambda item: (item[1].reads, item[1].begun_count))
        return place, address

    def _is_own(self, chunk: Span) -> bool:
        """Whether this node reads a chunk from the cloud, if from nobody else."""
        return chunk in self._claims or self._is_distrustful or self._peer_failures[chunk] >= _MAX_FAILURES

    def _plan_claim(self, chunks: Sequence[Span], now: float) -> None:
        is_early = not self._has_met or any(peer.silent_until > now for peer in self._peers.values())
        if self._is_asking or now < self._ask_after or is_early:
            self._asked = None
            return
        usable = [peer for peer in self._peers.values() if not peer.is_dropped]
        nobodys = tuple(c for c in chunks if c not in self._claims and not any(peer.has(c) for peer in usable))
        reading = sum(source == STORE for _, source in self._reading.values())
        is_shared = len(nobodys) + len(self._claims) < len(chunks)
        share = max(1, self._parallel // 2) if is_shared else self._parallel
        limit = share + 2 - reading - len(self._claims)
        self._asked = Asked(nobodys[:256], limit, self._excluded(now)) if nobodys and limit > 0 else None

    def _excluded(self, now: float) -> frozenset[str]:
        return frozenset(
            peer.node
            for peer in self._peers.values()
            if self._is_distrustful
            or peer.is_dropped
            or (peer.unreached_since is not None and now - peer.unreached_since >= _UNREACHED_SECONDS)
        )

    def _mix(self, number: int) -> int:
        return zlib.crc32(f"{self._salt}/{number}".encode())
