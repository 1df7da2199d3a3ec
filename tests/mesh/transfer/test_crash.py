"""A fetching process that is killed again and again: what it had is kept, and never a wrong byte."""

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helios.mesh.transfer.journal import journal_path
from tests.mesh.transfer.blob_server import BlobServer, serve_blob
from tests.mesh.transfer.fetching import CHUNK_BYTES

ROOT = Path(__file__).resolve().parents[3]
CONTENT = random.Random(8).randbytes(48 * CHUNK_BYTES + 9)
CHUNK_COUNT = 49
RECORD_BYTES = 40
WAIT_SECONDS = 60.0


def _start(server: BlobServer, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.mesh.transfer.fetching", server.url, str(target)]
    command += [str(len(CONTENT)), hashlib.sha256(CONTENT).hexdigest()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def _kill_at_random(target: Path, seed: int, kill_count: int) -> None:
    chance = random.Random(seed)
    noted = 0
    with serve_blob(CONTENT) as server:
        for _ in range(kill_count):
            with _start(server, target) as process:
                goal = noted + chance.randint(0, 2 * CHUNK_COUNT // kill_count)
                _wait(process, target, goal)
                time.sleep(chance.uniform(0, 0.03))
                process.kill()
            noted = _noted_count(target)
        with _start(server, target) as process:
            output, _ = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0
    assert target.read_bytes() == CONTENT
    assert not journal_path(target).exists()
    resumed_bytes = int(output.removeprefix("resumed "))
    assert resumed_bytes >= min(len(CONTENT), (noted - 1) * CHUNK_BYTES), "what was noted is not fetched again"


def _noted_count(target: Path) -> int:
    """Chunks that the journal says are there; all when the fetch was complete, for then the journal is gone."""
    try:
        records = journal_path(target).read_bytes().partition(b"\n")[2]
    except FileNotFoundError:
        return CHUNK_COUNT if target.exists() and target.stat().st_size == len(CONTENT) else 0
    return len(records) // RECORD_BYTES


def _wait(process: subprocess.Popen[str], target: Path, goal: int) -> None:
    """Waits until so many chunks are noted, or the process is done."""
    deadline = time.monotonic() + WAIT_SECONDS
    while process.poll() is None and _noted_count(target) < goal:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_fetch_goes_on(tmp_path: Path) -> None:
    _kill_at_random(tmp_path / "blob", seed=1, kill_count=4)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_a_fetch_survives_hundreds_of_kills(tmp_path: Path, seed: int) -> None:
    _kill_at_random(tmp_path / "blob", seed=seed, kill_count=10)
