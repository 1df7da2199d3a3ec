"""Fetching a blob from a peer, against a bare gRPC stream of raw bytes with mTLS.

The baseline's stream carries the same messages of 1 MiB without protobuf, from one file to one file, with sha256 in a
second thread, room taken at once and one fsync at the end. It verifies no chunk, asks nobody who may read, and does not
go on where it stopped. Both are served by one process of their own, in turns; what is compared is the pair of a round.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3

from helios.mesh.identity import CertificateAuthority, IdentityFiles, server_name
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.order import Transfer, Wanted
from helios.storage.chunk_index import ChunkIndex
from helios.storage.manifest import Digest
from helios.storage.peers import PeerSource
from helios.storage.verified_source import VerifiedSource
from tests.benchmarks.peer_server import BARE_METHOD

BLOB_BYTES = 1 << 30
CHUNK_BYTES = 4 << 20
SAMPLE_COUNT = 7
_ROOT = Path(__file__).resolve().parents[2]
_DIRECTORY = _ROOT / "build"
"""On the repository's disk: a temporary directory may be memory."""


def run() -> list[dict[str, Any]]:
    """Measures, and returns the throughput as a ratio of the baseline's; `baseline` is that in MiB/s."""
    _DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="peer-bench-") as name:
        directory = Path(name)
        identity = CertificateAuthority.open(directory / "ca").issue("storage", directory / "pki")
        digest, index = _make_blob(directory / "blob")
        with _serve(directory / "blob", digest, identity) as (peer, bare):
            runs: dict[str, Callable[[], None]] = {
                "bare": lambda: _fetch_bare(bare, identity, directory / "bare", digest),
                "peer": lambda: _fetch(peer, identity, directory / "peer", digest, index),
            }
            seconds: dict[str, list[float]] = {kind: [] for kind in runs}
            for number in range(SAMPLE_COUNT):
                # The order turns round each time, so that neither always runs after the other.
                for kind in list(runs)[:: 1 if number % 2 else -1]:
                    os.sync()
                    started = time.monotonic()
                    runs[kind]()
                    seconds[kind].append(time.monotonic() - started)
    ratios = [b / s for b, s in zip(seconds["bare"], seconds["peer"], strict=True)]
    return [
        {
            "name": "storage.peer_fetch_ratio",
            "value": round(statistics.median(ratios), 3),
            "unit": "ratio",
            "baseline": round((BLOB_BYTES >> 20) / statistics.median(seconds["bare"]), 1),
            "samples": SAMPLE_COUNT,
        }
    ]


def _fetch(address: str, identity: IdentityFiles, target: Path, digest: Digest, index: ChunkIndex) -> None:
    source = VerifiedSource(PeerSource(address, digest, identity=identity), index)
    Downloader().fetch(Transfer(source, target, Wanted(digest.size_bytes, digest.hash, index.lengths, index.hashes)))
    target.unlink()


def _fetch_bare(address: str, identity: IdentityFiles, target: Path, digest: Digest) -> None:
    """The baseline."""
    pem = identity.read()
    credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
    options = (("grpc.ssl_target_name_override", server_name("storage")), ("grpc.max_receive_message_length", 4 << 20))
    sha256 = hashlib.sha256()
    with (
        grpc.secure_channel(address, credentials, options=options) as channel,
        target.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as hashing,
    ):
        os.posix_fallocate(file.fileno(), 0, digest.size_bytes)
        running: Future[None] = hashing.submit(sha256.update, b"")
        method: Any = channel.unary_stream(BARE_METHOD)
        for message in method(b"", timeout=120.0):
            file.write(message)
            running.result()
            running = hashing.submit(sha256.update, message)
        running.result()
        os.fsync(file.fileno())
    assert sha256.hexdigest() == digest.hash
    target.unlink()


def _make_blob(path: Path) -> tuple[Digest, ChunkIndex]:
    sha256 = hashlib.sha256()
    chunks: list[tuple[int, bytes]] = []
    with path.open("wb") as file:
        for _ in range(BLOB_BYTES // CHUNK_BYTES):
            piece = os.urandom(CHUNK_BYTES)
            sha256.update(piece)
            chunks.append((CHUNK_BYTES, blake3(piece).digest()))
            file.write(piece)
    return Digest(sha256.hexdigest(), BLOB_BYTES), ChunkIndex(BLOB_BYTES, chunks)


@contextmanager
def _serve(path: Path, digest: Digest, identity: IdentityFiles) -> Iterator[tuple[str, str]]:
    command = [sys.executable, "-m", "tests.benchmarks.peer_server", str(path), digest.hash, str(identity.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            peer, bare = process.stdout.readline().split()
            yield peer, bare
        finally:
            process.stdin.close()
            process.wait(timeout=10.0)


if __name__ == "__main__":
    for entry in run():
        print(entry)
