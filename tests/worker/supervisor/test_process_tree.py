"""Real processes: whole trees die, nobody else does."""

import asyncio
import os
import signal
import time
from collections.abc import Callable

import pytest

from helios.worker.supervisor.process_tree import find_tree, is_alive, kill_tree, reap, watch_exit
from helios.worker.supervisor.records import ProcessIdentity
from tests.worker.supervisor.fakes import kill_and_wait, living, spawn_session

# Front, EngineCore, Worker; all of them deaf to SIGTERM.
_TREE = "import os,signal,time; signal.signal(15, signal.SIG_IGN); os.fork() or os.fork(); time.sleep(600)"
# Passes itself on: each process forks the next and ends, faster than /proc can be read.
_RELAY = """
import os, time
while True:
    if os.fork():
        os._exit(0)
"""


async def eventually(is_met: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_met():
            await asyncio.sleep(0.01)


async def spawn_tree(orphans: list[int]) -> ProcessIdentity:
    front = spawn_session("-c", _TREE)
    orphans.append(front.pid)
    await eventually(lambda: len(living(front)) == 3)
    return front


async def test_a_tree_that_ignores_sigterm_dies_whole(orphans: list[int]) -> None:
    front = await spawn_tree(orphans)
    os.killpg(front.pid, signal.SIGTERM)
    assert len(living(front)) == 3
    await kill_tree(front)
    assert find_tree(front) == []


async def test_what_a_killed_front_leaves_behind_dies_too(orphans: list[int]) -> None:
    front = await spawn_tree(orphans)
    kill_and_wait(front)
    assert len(living(front)) == 2
    await kill_tree(front)
    assert find_tree(front) == []


async def test_a_process_that_passes_itself_on_by_forking_does_not_get_away(orphans: list[int]) -> None:
    front = spawn_session("-c", _RELAY)
    orphans.append(front.pid)
    await eventually(lambda: not is_alive(front))
    await kill_tree(front)
    # A look at /proc could miss it; the kernel's answer is exact (its last zombie may wait for us).
    reap(frozenset({front.pid}))
    with pytest.raises(ProcessLookupError):
        os.killpg(front.pid, 0)


async def test_another_process_with_the_same_pid_is_left_alone(orphans: list[int]) -> None:
    front = await spawn_tree(orphans)
    stranger = ProcessIdentity(front.pid, front.start_ticks - 1)
    assert not is_alive(stranger)
    await kill_tree(stranger)
    assert len(living(front)) == 3
    await kill_tree(front)


async def test_a_descendant_with_a_session_of_its_own_dies_with_its_parent(orphans: list[int]) -> None:
    front = spawn_session("-c", "import os,time; os.fork() or os.setsid(); time.sleep(600)")
    orphans.append(front.pid)
    await eventually(lambda: len({entry.session_id for entry in find_tree(front)}) == 2)
    await kill_tree(front)
    assert find_tree(front) == []


async def test_a_death_is_seen_at_once(orphans: list[int]) -> None:
    front = await spawn_tree(orphans)
    async with watch_exit(front) as gone:
        assert not gone.is_set()
        killed_at = time.monotonic()
        os.kill(front.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            await gone.wait()
    assert time.monotonic() - killed_at < 1.0
    await kill_tree(front)


async def test_a_process_that_is_dead_already_is_seen_as_gone() -> None:
    async with watch_exit(ProcessIdentity(os.getpid(), 1)) as gone:
        assert gone.is_set()


async def test_orphans_of_a_replica_are_waited_for_and_nobody_elses(orphans: list[int]) -> None:
    front = await spawn_tree(orphans)
    other = await spawn_tree(orphans)
    for tree in (front, other):
        for pid in living(tree):
            os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not living(front) and not living(other))
    await eventually(lambda: len(find_tree(front)) == 3)
    assert len(reap(frozenset({front.pid}))) == 3
    assert len(find_tree(other)) == 3
    reap(frozenset({other.pid}))


@pytest.mark.parametrize("pid", [0, 1 << 22])
def test_a_pid_that_nobody_has_is_nobody(pid: int) -> None:
    assert not is_alive(ProcessIdentity(pid, 0))
