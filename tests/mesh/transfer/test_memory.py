"""A fetch takes as much memory as its buffers, whatever the size of the blob: checkpoints are larger than memory."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mesh.transfer.blob_server import serve_blob

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
SMALL, LARGE = 4 * MIB, 192 * MIB


@pytest.mark.slow
def test_a_large_blob_takes_hardly_more_memory_than_a_small_one(tmp_path: Path) -> None:
    assert _peak_bytes(tmp_path, LARGE) - _peak_bytes(tmp_path, SMALL) < 64 * MIB


def _peak_bytes(directory: Path, size: int) -> int:
    """Fetches a blob in a process of its own; returns the most memory that it had."""
    content = bytes(size)
    target = directory / str(size)
    with serve_blob(content) as server:
        command = [sys.executable, "-m", "tests.mesh.transfer.fetching", server.url, str(target), str(size)]
        command += [hashlib.sha256(content).hexdigest(), "usual"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert target.stat().st_size == size
    return int(done.stdout.split()[-1])
