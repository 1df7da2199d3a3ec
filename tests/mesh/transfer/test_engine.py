"""The engine with real sockets, real files and every fault that a source may have."""

import dataclasses
import hashlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from helios.mesh.errors import (
    BlobNotFound,
    DeadlineExceeded,
    DigestMismatch,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import DownloadGate, Priority
from helios.mesh.transfer.http import HttpSource
from helios.mesh.transfer.journal import journal_path
from helios.mesh.transfer.machine import RetryPolicy
from helios.mesh.transfer.order import Transfer, TransferOptions, Wanted
from helios.mesh.transfer.progress import TransferProgress
from helios.mesh.transfer.source import Sink, SourceChanged, SourceFault, SourceState
from tests.mesh.transfer.blob_server import Answer, BlobServer, Request, serve_blob

CHUNK = 64 << 10
CONTENT = random.Random(4).randbytes(10 * CHUNK + 77)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WANTED = Wanted(len(CONTENT), SHA256)
PARTS = [CONTENT[at : at + CHUNK // 2] for at in range(0, len(CONTENT), CHUNK // 2)]
KNOWN = Wanted(len(CONTENT), SHA256, tuple(map(len, PARTS)), tuple(blake3(part).digest() for part in PARTS))
OPTIONS = TransferOptions(
    chunk_bytes=CHUNK,
    in_flight=4,
    sync_bytes=2 * CHUNK,
    stall_seconds=0.3,
    stall_bytes=8 << 10,
    retry=RetryPolicy(max_attempts=4, base_seconds=0.01, cap_seconds=0.05),
)


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with serve_blob(CONTENT) as blob:
        yield blob


def _fetch(source: HttpSource, target: Path, wanted: Wanted = WANTED, **fields: object) -> object:
    return Downloader(OPTIONS).fetch(Transfer(source, target, wanted, **fields))  # type: ignore[arg-type]


def _once(fault: Answer) -> "_Script":
    return _Script(fault, count=1)


class _Script:
    """Answers the first so many requests for data with a fault."""

    def __init__(self, fault: Answer, count: int) -> None:
        self._fault = fault
        self._left = count
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Answer:
        with self._lock:
            if request.last == 0 or self._left == 0:
                return Answer()
            self._left -= 1
            return self._fault


def test_a_blob_comes_in_parallel_ranges_each_once(server: BlobServer, tmp_path: Path) -> None:
    seen: list[TransferProgress] = []
    transfer = Transfer(HttpSource(server.url), tmp_path / "blob", WANTED, on_progress=seen.append)
    result = Downloader(OPTIONS).fetch(transfer)
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert (result.sha256, result.size_bytes, result.etag) == (SHA256, len(CONTENT), '"one"')
    assert (result.fetched_bytes, result.resumed_bytes) == (len(CONTENT), 0)
    assert sorted(server.ranges) == [(at, min(at + CHUNK, len(CONTENT)) - 1) for at in range(0, len(CONTENT), CHUNK)]
    assert not journal_path(tmp_path / "blob").exists()
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_blobs_of_any_size(size: int, tmp_path: Path) -> None:
    content = CONTENT[:size]
    wanted = Wanted(size, hashlib.sha256(content).hexdigest())
    with serve_blob(content) as blob:
        result = Downloader(OPTIONS).fetch(Transfer(HttpSource(blob.url), tmp_path / "blob", wanted))
    assert (tmp_path / "blob").read_bytes() == content
    assert result.fetched_bytes == size


def test_what_is_not_known_beforehand_is_said_afterwards(server: BlobServer, tmp_path: Path) -> None:
    result = Downloader(OPTIONS).fetch(Transfer(HttpSource(server.url), tmp_path / "blob"))
    assert (result.sha256, result.size_bytes) == (SHA256, len(CONTENT))


def test_a_server_without_ranges_is_read_as_a_whole(tmp_path: Path) -> None:
    with serve_blob(CONTENT, is_ranged=False) as blob:
        result = Downloader(OPTIONS).fetch(Transfer(HttpSource(blob.url), tmp_path / "blob", WANTED))
    assert result.sha256 == SHA256


@pytest.mark.parametrize(
    "fault",
    [
        Answer(status=500),
        Answer(status=429, headers={"Retry-After": "0"}),
        Answer(cut_bytes=1000),
        Answer(hang=True),
        Answer(drip_seconds=0.05),
        Answer(headers={"Content-Range": f"bytes 0-{CHUNK - 1}/{len(CONTENT)}"}),
    ],
    ids=["500", "429", "reset", "hang", "drip", "wrong range"],
)
def test_a_fault_costs_a_retry_and_no_byte(server: BlobServer, tmp_path: Path, fault: Answer) -> None:
    server.script = _Script(fault, count=2)
    source = HttpSource(server.url, timeout_seconds=0.5)
    result = Downloader(OPTIONS).fetch(Transfer(source, tmp_path / "blob", WANTED))
    assert result.sha256 == SHA256
    assert len(server.ranges) > len(set(server.ranges)), "what failed was asked for again"


def test_retry_after_is_kept_by_all_requests(server: BlobServer, tmp_path: Path) -> None:
    times: list[float] = []
    refused = _once(Answer(status=503, headers={"Retry-After": "1"}))

    def script(request: Request) -> Answer:
        answer = refused(request)
        times.append(time.monotonic() if answer.status == 0 else -time.monotonic())
        return answer

    server.script = script
    _fetch(HttpSource(server.url), tmp_path / "blob")
    refused_at = -next(at for at in times if at < 0)
    # Requests that were on their way then don't count.
    late = [at - refused_at for at in times if at > refused_at + 0.2]
    assert late
    assert min(late) >= 0.99


@pytest.mark.parametrize(
    ("status", "error"), [(404, BlobNotFound), (401, Unauthenticated), (403, PermissionDenied), (500, Unavailable)]
)
def test_a_refusal_for_good_is_said_as_it_is(
    server: BlobServer, tmp_path: Path, status: int, error: type[Exception]
) -> None:
    server.script = lambda _: Answer(status=status)
    with pytest.raises(error):
        _fetch(HttpSource(server.url), tmp_path / "blob")
    assert len(server.requests) == (1 if status != 500 else OPTIONS.retry.max_attempts)


def test_an_expired_token_is_renewed_by_whoever_gives_headers(server: BlobServer, tmp_path: Path) -> None:
    server.script = lambda r: Answer(status=0 if r.headers.get("Authorization") == "Bearer fresh" else 401)
    tokens = iter(["fresh"] * 100)
    _fetch(HttpSource(server.url, headers=lambda: {"Authorization": f"Bearer {next(tokens)}"}), tmp_path / "blob")
    with pytest.raises(Unauthenticated):
        _fetch(HttpSource(server.url, headers=lambda: {"Authorization": "Bearer old"}), tmp_path / "other")


def test_a_redirect_is_followed_without_the_token_and_remembered_until_it_fails(
    server: BlobServer, tmp_path: Path
) -> None:
    is_expired = threading.Event()
    with serve_blob(CONTENT, etag=server.etag) as storage:
        storage.script = lambda r: Answer(
            status=403 if "signature=old" in r.path and (is_expired.is_set() or r.number >= 4) else 0
        )
        signatures = iter(["old", *["new"] * 100])
        server.script = lambda _: Answer(
            status=302, headers={"Location": f"{storage.url}?signature={next(signatures)}"}
        )
        _fetch(HttpSource(server.url, headers=lambda: {"Authorization": "Bearer secret"}), tmp_path / "blob")
        assert all("Authorization" not in request.headers for request in storage.requests)
        assert all(request.headers["Authorization"] == "Bearer secret" for request in server.requests)
        assert len(server.requests) < len(storage.requests)


def test_changed_bytes_begin_anew_and_are_never_mixed(server: BlobServer, tmp_path: Path) -> None:
    other = random.Random(5).randbytes(len(CONTENT))

    def script(request: Request) -> Answer:
        if request.number == 4:
            server.content, server.etag = other, '"two"'
        return Answer()

    server.script = script
    result = Downloader(OPTIONS).fetch(Transfer(HttpSource(server.url), tmp_path / "blob"))
    assert result.sha256 == hashlib.sha256(other).hexdigest()
    assert (tmp_path / "blob").read_bytes() == other


def test_bytes_that_change_for_ever_are_given_up(server: BlobServer, tmp_path: Path) -> None:
    def script(request: Request) -> Answer:
        if request.last:
            server.etag = f'"{request.number}"'
        return Answer()

    server.script = script
    with pytest.raises(SourceChanged):
        Downloader(OPTIONS).fetch(Transfer(HttpSource(server.url), tmp_path / "blob"))
    assert list(tmp_path.iterdir()) == []


def test_wrong_bytes_are_refused_and_leave_nothing(server: BlobServer, tmp_path: Path) -> None:
    for wanted in (Wanted(len(CONTENT), "0" * 64), Wanted(len(CONTENT) + 1, SHA256)):
        with pytest.raises(DigestMismatch):
            _fetch(HttpSource(server.url), tmp_path / "blob", wanted)
        assert list(tmp_path.iterdir()) == []


def test_what_was_complete_when_its_process_died_is_not_fetched_again(server: BlobServer, tmp_path: Path) -> None:
    _fetch(HttpSource(server.url), tmp_path / "blob")
    count = len(server.requests)
    seen: list[TransferProgress] = []
    transfer = Transfer(HttpSource(server.url), tmp_path / "blob", WANTED, on_progress=seen.append)
    result = Downloader(OPTIONS).fetch(transfer)
    assert (result.fetched_bytes, result.resumed_bytes, len(server.requests)) == (0, len(CONTENT), count)
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (len(CONTENT), len(CONTENT)), "hashing is progress too"
    (tmp_path / "blob").write_bytes(CONTENT[:-1] + b"!")
    _fetch(HttpSource(server.url), tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT


@pytest.mark.parametrize("wanted", [WANTED, KNOWN], ids=["journal", "index"])
def test_a_transfer_goes_on_where_an_earlier_one_failed(server: BlobServer, tmp_path: Path, wanted: Wanted) -> None:
    server.script = lambda request: Answer(status=404 if request.first >= 6 * CHUNK else 0)
    with pytest.raises(BlobNotFound):
        _fetch(HttpSource(server.url), tmp_path / "blob", wanted)
    assert journal_path(tmp_path / "blob").exists()
    server.script = lambda _: Answer()
    result = Downloader(OPTIONS).fetch(Transfer(HttpSource(server.url), tmp_path / "blob", wanted))
    assert result.resumed_bytes >= 2 * CHUNK
    assert result.resumed_bytes + result.fetched_bytes == len(CONTENT)
    assert (tmp_path / "blob").read_bytes() == CONTENT


@pytest.mark.parametrize("wanted", [WANTED, KNOWN], ids=["journal", "index"])
def test_what_was_damaged_between_two_transfers_is_fetched_again(
    server: BlobServer, tmp_path: Path, wanted: Wanted
) -> None:
    server.script = lambda request: Answer(status=404 if request.first >= 6 * CHUNK else 0)
    with pytest.raises(BlobNotFound):
        _fetch(HttpSource(server.url), tmp_path / "blob", wanted)
    with (tmp_path / "blob").open("r+b") as file:
        file.seek(10)
        file.write(b"flipped")
    server.script = lambda _: Answer()
    result = Downloader(OPTIONS).fetch(Transfer(HttpSource(server.url), tmp_path / "blob", wanted))
    assert 0 < result.resumed_bytes < len(CONTENT)
    assert (tmp_path / "blob").read_bytes() == CONTENT


def test_what_an_index_says_is_believed_over_a_journal(server: BlobServer, tmp_path: Path) -> None:
    server.script = lambda request: Answer(status=404 if request.first >= 6 * CHUNK else 0)
    with pytest.raises(BlobNotFound):
        _fetch(HttpSource(server.url), tmp_path / "blob", Wanted(len(CONTENT), SHA256, KNOWN.part_lengths))
    other = dataclasses.replace(KNOWN, part_hashes=(b"\0" * 32, *KNOWN.part_hashes[1:]))
    server.script = lambda _: Answer()
    asked_count = len(server.ranges)
    _fetch(HttpSource(server.url), tmp_path / "blob", other)
    assert (0, CHUNK - 1) in server.ranges[asked_count:], "its bytes are not what the index says"


def test_bytes_of_another_state_without_an_etag_are_found_by_the_whole(tmp_path: Path) -> None:
    old = random.Random(6).randbytes(len(CONTENT))
    with serve_blob(old, etag="") as blob:
        blob.script = lambda request: Answer(status=404 if request.first >= 6 * CHUNK else 0)
        with pytest.raises(BlobNotFound):
            _fetch(HttpSource(blob.url), tmp_path / "blob")
        blob.content, blob.script = CONTENT, lambda _: Answer()
        result = Downloader(OPTIONS).fetch(Transfer(HttpSource(blob.url), tmp_path / "blob", WANTED))
    assert (result.resumed_bytes, result.sha256) == (0, SHA256)


def test_a_check_ends_a_transfer_soon_although_the_source_hangs(server: BlobServer, tmp_path: Path) -> None:
    server.script = lambda request: Answer(hang=request.last > 0)
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise Unavailable("nobody wants it", reason="FETCH_CANCELLED")

    timer = threading.Timer(0.1, cancelled.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(Unavailable, match="nobody wants it"):
        _fetch(HttpSource(server.url, timeout_seconds=20.0), tmp_path / "blob", check=check)
    assert time.monotonic() - started < 5.0
    timer.join()


def test_a_deadline_is_kept(server: BlobServer, tmp_path: Path) -> None:
    server.script = lambda request: Answer(drip_seconds=0.02 if request.last else 0)
    with pytest.raises(DeadlineExceeded):
        _fetch(HttpSource(server.url), tmp_path / "blob", deadline=time.monotonic() + 0.2)


def test_a_target_that_can_not_be_written_is_the_callers_error(server: BlobServer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _fetch(HttpSource(server.url), tmp_path / "nowhere" / "blob")
    assert server.ranges == []


def test_the_cap_holds_and_a_start_beats_a_prefetch(server: BlobServer, tmp_path: Path) -> None:
    downloader = Downloader(OPTIONS, DownloadGate(bytes_per_second=2 * len(CONTENT)))
    ended: dict[str, float] = {}
    started = time.monotonic()

    def fetch(name: str, priority: Priority) -> None:
        downloader.fetch(Transfer(HttpSource(server.url), tmp_path / name, WANTED, priority))
        ended[name] = time.monotonic() - started

    prefetch = threading.Thread(target=fetch, args=("prefetch", Priority.PREFETCH))
    prefetch.start()
    time.sleep(0.05)
    fetch("start", Priority.START)
    prefetch.join()
    assert ended["start"] < ended["prefetch"]
    # Two blobs at two blobs a second; the first chunk is not waited for. How exact the cap is, the gate's tests say: a
    # busy machine is slow, but not as slow as a cap that lets in a tenth.
    assert 0.85 < ended["prefetch"] < 10.0


class _LyingSource:
    """Sends more, or fewer, bytes than were asked for."""

    def __init__(self, extra_bytes: int) -> None:
        self._extra_bytes = extra_bytes

    def describe(self) -> SourceState:
        return SourceState(len(CONTENT))

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        sink(memoryview(CONTENT[offset : offset + length + self._extra_bytes]))

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("extra_bytes", [1, -1])
def test_an_answer_of_another_length_is_an_error(tmp_path: Path, extra_bytes: int) -> None:
    with pytest.raises(SourceFault):
        Downloader(OPTIONS).fetch(Transfer(_LyingSource(extra_bytes), tmp_path / "blob", WANTED))
