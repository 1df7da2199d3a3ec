"""A fetching process that is killed again and again: what it had is kept, and never a wrong byte."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

from helios.mesh.transfer.journal import journal_path
from tests.mesh.transfer.blob_server import BlobServer, serve_blob
from tests.mesh.transfer.fetching import BYTES_PER_SECOND, CHUNK_BYTES

ROOT = Path(__file__).resolve().parents[3]
CONTENT = random.Random(8).randbytes(48 * CHUNK_BYTES + 9)
WHOLE_SECONDS = len(CONTENT) / BYTES_PER_SECOND


def _start(server: BlobServer, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.mesh.transfer.fetching", server.url, str(target)]
    command += [str(len(CONTENT)), hashlib.sha256(CONTENT).hexdigest()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def _kill_at_random(target: Path, seed: int, kill_count: int) -> None:
    chance = random.Random(seed)
    with serve_blob(CONTENT) as server:
        for _ in range(kill_count):
            with _start(server, target) as process:
                try:
                    process.wait(chance.uniform(0, WHOLE_SECONDS))
                except subprocess.TimeoutExpired:
                    process.kill()
        with _start(server, target) as process:
            output, _ = process.communicate(timeout=30.0)
        assert process.returncode == 0
        fetched = sum(last + 1 - first for first, last in server.ranges)
    assert target.read_bytes() == CONTENT
    assert not journal_path(target).exists()
    # Each kill costs what was in flight and what was not synced yet, never the whole.
    assert fetched <= len(CONTENT) + kill_count * 12 * CHUNK_BYTES
    assert int(output.removeprefix("resumed ")) > 0


@pytest.mark.slow
def test_a_killed_fetch_goes_on(tmp_path: Path) -> None:
    _kill_at_random(tmp_path / "blob", seed=1, kill_count=4)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_a_fetch_survives_hundreds_of_kills(tmp_path: Path, seed: int) -> None:
    _kill_at_random(tmp_path / "blob", seed=seed, kill_count=10)
