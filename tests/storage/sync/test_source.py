"""One blob of many sources, through the transfer engine's threads: who lies, fails or stalls costs no byte of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helios.mesh.errors import HeliosError, Overloaded, PermissionDenied, Unavailable
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.order import Transfer, Wanted
from helios.mesh.transfer.source import ChunkMismatch, RangeSource, Sink, SourceState
from helios.mesh.transfer.spans import Span
from helios.storage.manifest import Digest
from helios.storage.sync.policy import Asked
from helios.storage.sync.source import SwarmSource
from tests.storage.test_chunks import CONTENT, DIGEST, INDEX, OPTIONS, Bytes


@dataclass
class Others:
    """A coordinator that knows peers in memory, and grants every claim at once."""

    peers: dict[str, RangeSource] = field(default_factory=dict)
    held: dict[str, list[Span]] = field(default_factory=dict)
    """What peers have that do not have all."""
    is_granted: bool = True
    asked: list[Asked] = field(default_factory=list)
    done: list[Span] = field(default_factory=list)
    given_up: list[Span] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)

    def begin(self, source: SwarmSource) -> None:
        source.meet([(name, f"node {name}", name not in self.held) for name in self.peers], is_all=True)
        for name, spans in self.held.items():
            source.has(name, spans, is_whole=False)

    def claim(self, source: SwarmSource, asked: Asked) -> None:
        self.asked.append(asked)
        source.answered(asked.spans[: asked.limit] if self.is_granted else ())

    def end_claims(self, source: SwarmSource, *, done: Sequence[Span] = (), given_up: Sequence[Span] = ()) -> None:
        del source
        self.done += done
        self.given_up += given_up

    def end(self, source: SwarmSource, *, is_whole: bool) -> None:
        del source
        self.ends.append(is_whole)

    def open_peer(self, address: str, digest: Digest) -> RangeSource:
        assert digest == DIGEST
        return self.peers[address]


class Busy(Bytes):
    """A source that asks for patience, and for more than the engine has."""

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        del state, sink
        self.reads.append((offset, length))
        raise Overloaded("busy", retry_after_seconds=OPTIONS.retry.max_retry_after_seconds + 1)


class Refusing(Bytes):
    """A source that refuses for good."""

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        del state, offset, length, sink
        raise PermissionDenied("no")


def fetch(others: Others, store: RangeSource, target: Path) -> SwarmSource:
    source = SwarmSource(DIGEST, INDEX, store, others, open_peer=others.open_peer, parallel=OPTIONS.in_flight)
    wanted = Wanted(DIGEST.size_bytes, DIGEST.hash, INDEX.lengths, INDEX.hashes)
    Downloader(OPTIONS).fetch(Transfer(source, target, wanted, guide=source))
    return source


def read_bytes(source: Bytes) -> int:
    return sum(length for _, length in source.reads)


def test_several_peers_are_read_at_once_and_the_cloud_not_at_all(tmp_path: Path) -> None:
    peers = [Bytes(), Bytes(), Bytes()]
    others, cloud = Others({str(number): peer for number, peer in enumerate(peers)}), Bytes()
    source = fetch(others, cloud, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert not cloud.reads
    assert all(peer.reads for peer in peers)
    assert source.peer_bytes() == sum(map(read_bytes, peers)) == len(CONTENT)
    assert min(others.done)[0] == 0
    assert sum(end - start for start, end in others.done) == len(CONTENT)


def test_what_no_peer_has_comes_from_the_cloud(tmp_path: Path) -> None:
    peer, cloud = Bytes(), Bytes()
    source = fetch(Others({"a": peer}, held={"a": [(0, 9_000)]}), cloud, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert source.peer_bytes() == read_bytes(peer) == 9_000
    assert read_bytes(cloud) == len(CONTENT) - 9_000


def test_a_peer_that_lies_is_dropped_and_told_of(tmp_path: Path) -> None:
    liar, cloud = Bytes(CONTENT[::-1]), Bytes()
    others = Others({"liar": liar})
    source = fetch(others, cloud, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert len(liar.reads) <= OPTIONS.in_flight
    assert source.peer_bytes() == 0
    assert others.asked[-1].excluded_nodes == {"node liar"}


def test_peers_that_fail_send_too_little_or_refuse_are_replaced(tmp_path: Path) -> None:
    cloud = Bytes()
    peers: dict[str, RangeSource] = {
        "gone": Bytes(fail_count=1000),
        "short": Bytes(short_bytes=1),
        "refusing": Refusing(),
    }
    source = fetch(Others(peers), cloud, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert source.peer_bytes() == 0
    assert read_bytes(cloud) == len(CONTENT)


def test_a_peer_that_asks_for_patience_makes_nobody_else_wait(tmp_path: Path) -> None:
    busy, good = Busy(), Bytes()
    source = fetch(Others({"busy": busy, "good": good}), Bytes(), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert 0 < len(busy.reads) <= OPTIONS.in_flight, "it rests"
    assert source.peer_bytes() == read_bytes(good) == len(CONTENT)


def test_a_claim_that_could_not_be_read_is_given_back(tmp_path: Path) -> None:
    others = Others()
    fetch(others, _Flaky(fail_count=2), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert len(others.given_up) == 2
    assert set(others.given_up) <= set(others.done)


@pytest.mark.parametrize("cloud", [Bytes(CONTENT[::-1]), Refusing()])
def test_when_nobody_has_right_bytes_the_blob_is_refused(tmp_path: Path, cloud: Bytes) -> None:
    with pytest.raises(HeliosError) as caught:
        fetch(Others(), cloud, tmp_path / "blob")
    assert isinstance(caught.value, ChunkMismatch | Unavailable | PermissionDenied)


def test_a_second_try_goes_on_with_what_is_here_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(HeliosError):
        # The first four ranges come, then none.
        fetch(Others(), _Ending(4), tmp_path / "blob")
    others, cloud = Others(), Bytes()
    fetch(others, cloud, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert 0 < read_bytes(cloud) < len(CONTENT)
    assert sum(end - start for start, end in others.done) == len(CONTENT), "others may have what was resumed"


class _Ending(Bytes):
    """A source that refuses after some reads."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        if len(self.reads) >= self._count:
            raise PermissionDenied("no")
        super().read(state, offset, length, sink)


class _Flaky(Bytes):
    """A source whose first reads fail."""

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        if self.fail_count:
            self.fail_count -= 1
            raise Unavailable("not now")
        super().read(state, offset, length, sink)
