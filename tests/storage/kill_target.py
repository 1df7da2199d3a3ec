"""A node that borrows, promotes, evicts and scrubs without end, and is killed; then the next start is looked at.

    python -m tests.storage.kill_target DIRECTORY SEED COUNT

A process that has imported everything forks one that works, kills it after a random while, and forks one that checks:
hundreds of kills in the time that a few starts of Python take. It has no threads of its own when it forks. Prints one
line for each kill; exits with 1 where something was wrong.
"""

import asyncio
import hashlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helios.mesh.errors import DiskFull, PreconditionFailed
from helios.storage.materializer import Materializer
from helios.storage.tiers import TierKind, TierOptions
from tests.storage.harness import Shelf, make_shelf
from tests.storage.local import check_consistent, lend, local_agent

TIERS = (
    TierOptions("disk", TierKind.SSD, 6 << 20),
    TierOptions("fast", TierKind.NVME, 4 << 20, high_ratio=0.9, low_ratio=0.6),
    TierOptions("memory", TierKind.MEMORY, 3 << 20, high_ratio=1.0, low_ratio=1.0),
)
LONGEST_SECONDS = 0.12
"""Past the first round of work of a machine that is not busy: kills hit the start, the middle and the end."""


def fill_shelf(directory: Path) -> tuple[Shelf, dict[str, dict[str, bytes]]]:
    """The same models each time: some share a blob, some are of many small ones."""
    shelf = make_shelf(directory / "shelf")
    source = random.Random(1)
    shared = source.randbytes(900_000)
    models: dict[str, dict[str, bytes]] = {}
    for number in range(5):
        files = {"shared": shared, "own": source.randbytes(300_000 * (number + 1))}
        files |= {f"config/{part}": source.randbytes(50) for part in range(3)}
        models[shelf.add(files)] = files
    return shelf, models


async def work(directory: Path, shelf: Shelf, seed: int) -> None:
    source = random.Random(seed)
    revisions = list(shelf.manifests)
    async with local_agent(directory, shelf, *TIERS) as agent:
        loans = []
        while True:
            try:
                match source.randrange(6):
                    case 0 | 1 | 2:
                        loans.append((await lend(agent, source.choice(revisions))).lease.id)
                    case 3:
                        await agent.evict(source.choice(revisions))
                    case 4:
                        await agent.mover.look()
                    case _:
                        async for _ in agent.scrubber.scrub_all(bytes_per_second=0):
                            pass
            except (DiskFull, PreconditionFailed):
                pass
            while len(loans) > 1:
                await agent.release(loans.pop(source.randrange(len(loans))))


async def check(directory: Path, shelf: Shelf, models: dict[str, dict[str, bytes]]) -> None:
    async with local_agent(directory, shelf, *TIERS) as agent:
        check_consistent(agent)
        for room in agent.rooms:
            assert room.tier.inventory.used_bytes <= room.tier.options.capacity_bytes
            for blob in room.tier.inventory.blobs():
                content = room.tier.store.blob_path(blob.hash).read_bytes()
                assert hashlib.sha256(content).hexdigest() == blob.hash
            for resident in room.tier.inventory.revisions():
                for path, expected in models[resident.revision].items():
                    assert (room.tier.view_path(resident.revision) / path).read_bytes() == expected
        await end_leases(agent)
        loan = await lend(agent, next(iter(models)))
        await agent.release(loan.lease.id)


async def end_leases(agent: Materializer) -> None:
    """What the killed one had lent is lent still, by a clock that stands still: it must not be evicted."""
    for room in agent.rooms:
        for lease in room.tier.persisted_leases:
            with pytest.raises(PreconditionFailed, match="in use"):
                await agent.evict(lease.revision)
            await agent.release(lease.id)


def fork(make_work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Runs a coroutine in a child; returns its pid."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        asyncio.run(make_work())
        status = 0
    except BaseException:  # noqa: BLE001 - the child's end: what is wrong is printed, and told by the status
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> int:
    directory, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    shelf, models = fill_shelf(directory)
    source = random.Random(seed)
    for number in range(count):
        pid = fork(partial(work, directory, shelf, seed + number))
        time.sleep(source.uniform(0.0, LONGEST_SECONDS))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the worker ended by itself"
        _, status = os.waitpid(fork(partial(check, directory, shelf, models)), 0)
        print("kill", number, "wrong" if status else "right", flush=True)
        if status:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
