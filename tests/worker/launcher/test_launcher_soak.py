"""Five hundred forks in a row, each killed at another moment of its start or of its life (`make soak`).

The simulated engine: what is counted is the launcher's and the front's, and every engine has these.
"""

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from helios.worker.launcher.client import LauncherClient
from tests.worker.replica.support import Leaves, make_spec, source_path

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

FORKS = 500
# Not counted: caches of the allocator and of the interpreter fill with the first ones.
WARM_UP_FORKS = 20
# A simulated replica is ready about then; kills come from the first instruction to well after it.
START_SECONDS = 0.25
SEED = 20261122
# Over all forks; the launcher keeps one spec and the last tokenizers, which this engine has none of.
KEPT_BYTES = 4 << 20


def measure(pid: int) -> dict[str, int]:
    process = psutil.Process(pid)
    children = process.children(recursive=True)
    return {
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(children),
        "zombies": sum(child.status() == psutil.STATUS_ZOMBIE for child in children),
        "bytes": process.memory_full_info().uss,
    }


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


async def test_five_hundred_forks_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", source_path())
    choose = random.Random(SEED)
    leaves = Leaves.issue(tmp_path / "pki")
    before: dict[str, int] = {}
    shared = shared_memory()
    async with LauncherClient(engine="simulated") as launcher:
        for number in range(WARM_UP_FORKS + FORKS):
            if number == WARM_UP_FORKS:
                assert launcher.pid is not None
                before = measure(launcher.pid)
            spec = make_spec(tmp_path, leaves, supervisor_address="", replica_id=f"r{number}")
            replica = await launcher.fork(spec, time.monotonic() + 30)
            await asyncio.sleep(choose.uniform(0, 2 * START_SECONDS))
            os.kill(replica.pid, choose.choice((signal.SIGKILL, signal.SIGTERM)))
            async with asyncio.timeout(30):
                ended = await launcher.exits.get()
            assert (ended.pid, ended.start_ticks) == (replica.pid, replica.start_ticks)
        assert launcher.pid is not None
        after = measure(launcher.pid)
    assert (after["children"], after["zombies"]) == (0, 0)
    assert (after["descriptors"], after["threads"]) == (before["descriptors"], before["threads"])
    assert after["bytes"] <= before["bytes"] + KEPT_BYTES, (before, after)
    assert shared_memory() <= shared
