"""SIGKILL at random points of fetch, lend, promote, evict and scrub: the next start repairs what is left."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _kill(directory: Path, *, seed: int, count: int, timeout_seconds: float) -> None:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.storage.kill_target", str(directory), str(seed), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert done.stdout.count("right") == count


def test_a_kill_at_any_point_is_repaired(scratch_path: Path) -> None:
    _kill(scratch_path, seed=1, count=25, timeout_seconds=120)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_point_is_repaired_hundreds_of_times(tmp_path: Path, seed: int) -> None:
    _kill(tmp_path, seed=1000 * seed, count=250, timeout_seconds=1800)
