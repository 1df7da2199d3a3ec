"""Whole process trees: naming processes for good, seeing them die, killing all of them.

A front process that is killed leaves EngineCore and Worker behind, with 2 GB and for good (measured). So each replica
is a process session of its own, the supervisor is the subreaper of whatever is orphaned, and a tree is gone only when
/proc shows nobody of it twice in a row. Signals go through pidfds, which name a process as surely as pid and start
time do.

psutil is not used here: it reads several files a process where one line of ``stat`` has pid, parent, session and
start time.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from helios.worker.supervisor.records import ProcessIdentity

log = structlog.get_logger()

# Source: linux/prctl.h.
_PR_SET_CHILD_SUBREAPER: Final = 36
_PROC: Final = Path("/proc")
# A killed engine with gigabytes takes some 50 ms to give them back; the first looks come fast, the later ones rarely.
_FIRST_PAUSE_SECONDS: Final = 0.01
_LONGEST_PAUSE_SECONDS: Final = 0.25
# A process in uninterruptible sleep ignores SIGKILL until its I/O ends: an operator should know.
_STUBBORN_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class ProcessEntry:
    """One line of the process table. ``is_zombie``: it holds nothing but its entry."""

    identity: ProcessIdentity
    parent_pid: int
    group_id: int
    session_id: int
    is_zombie: bool


def become_subreaper() -> None:
    """Makes this process the parent of every orphan below it. Raises OSError where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"can't become a subreaper: {os.strerror(number)}")


def read_process(pid: int) -> ProcessEntry | None:
    """Returns the entry of a pid; None where there is none."""
    try:
        line = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command in parentheses may hold spaces and parentheses itself. Source: proc_pid_stat(5).
    fields = line[line.rindex(b")") + 2 :].split()
    return ProcessEntry(
        identity=ProcessIdentity(pid, int(fields[19])),
        parent_pid=int(fields[1]),
        group_id=int(fields[2]),
        session_id=int(fields[3]),
        is_zombie=fields[0] in (b"Z", b"X"),
    )


def is_alive(process: ProcessIdentity) -> bool:
    """Whether exactly this process runs; a zombie does not."""
    entry = read_process(process.pid)
    return entry is not None and entry.identity == process and not entry.is_zombie


def boot_id() -> str:
    """Returns what is different after each boot: pids and start times mean nothing across one."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def find_tree(front: ProcessIdentity) -> list[ProcessEntry]:
    """Returns the replica's processes, zombies included: its session and everything that descends from a member.

    A pid is not given out again while a session of that number has members. So where another process has the front's
    pid, nothing of the tree is left.
    """
    entries = {entry.identity.pid: entry for entry in _entries()}
    holder = entries.get(front.pid)
    if holder is not None and holder.identity != front:
        return []
    found = {pid for pid, entry in entries.items() if entry.session_id == front.pid or entry.identity == front}
    has_grown = bool(found)
    while has_grown:
        below = {pid for pid, entry in entries.items() if entry.parent_pid in found} - found
        found |= below
        has_grown = bool(below)
    found.discard(os.getpid())
    return [entries[pid] for pid in sorted(found)]


async def kill_tree(front: ProcessIdentity) -> None:
    """Kills a replica's processes and returns when none is left; never returns before.

    It looks again after an empty look, because /proc is not read in one instant: a process that forks and dies
    between two lines of the listing shows neither itself nor its child. The front's own group is therefore signalled
    at each look, also an empty one: the kernel does that in one step, forks included.
    """
    loop = asyncio.get_running_loop()
    started, is_reported = loop.time(), False
    pause, empty_looks = _FIRST_PAUSE_SECONDS, 0
    while empty_looks < 2:
        living = await asyncio.to_thread(_kill_once, front)
        empty_looks = 0 if living else empty_looks + 1
        if not is_reported and loop.time() - started > _STUBBORN_SECONDS:
            is_reported = True
            log.warning("processes do not die", front_pid=front.pid, pids=[identity.pid for identity in living[:16]])
        if empty_looks < 2:
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS) if living else _FIRST_PAUSE_SECONDS


@contextlib.asynccontextmanager
async def watch_exit(process: ProcessIdentity) -> AsyncIterator[asyncio.Event]:
    """Gives an event that is set within milliseconds of the death of a process, whoever its parent is."""
    gone = asyncio.Event()
    descriptor = _open_pidfd(process)
    if descriptor is None:
        gone.set()
        yield gone
        return
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, gone.set)
    try:
        yield gone
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def reap(front_pids: frozenset[int]) -> list[int]:
    """Waits for dead children that belong to one of these sessions, so that no zombie stays; returns their pids.

    Only orphans of replicas are waited for: the launcher's exit status belongs to the launcher's client.
    """
    if not _has_dead_child():
        return []
    own = os.getpid()
    dead = [entry for entry in _entries() if entry.is_zombie and entry.parent_pid == own]
    return [entry.identity.pid for entry in dead if entry.session_id in front_pids and _wait_for(entry.identity.pid)]


def _has_dead_child() -> bool:
    """Returns whether any child is a zombie: one system call, where a walk through /proc takes milliseconds."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _kill_once(front: ProcessIdentity) -> list[ProcessIdentity]:
    living: list[ProcessEntry] = []
    for entry in find_tree(front):
        if entry.is_zombie:
            if entry.parent_pid == os.getpid():
                _wait_for(entry.identity.pid)
            continue
        living.append(entry)
    # A group is signalled in one step, so that a process which forks faster than it is looked for can't slip away. The
    # group's number is its own while a member of it lives: one just did, and the front's is nobody else's process.
    groups = {entry.group_id for entry in living if entry.session_id == front.pid}
    holder = read_process(front.pid)
    # killpg means this process's own group by 0, and everybody by 1.
    if front.pid > 1 and (holder is None or holder.identity == front):
        groups.add(front.pid)
    for group_id in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group_id, signal.SIGKILL)
    for entry in living:
        _kill(entry.identity)
    return [entry.identity for entry in living]


def _kill(process: ProcessIdentity) -> None:
    descriptor = _open_pidfd(process)
    if descriptor is None:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)


def _open_pidfd(process: ProcessIdentity) -> int | None:
    """Returns a pidfd of exactly this process; None where it is dead."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    # The pid may have changed hands before the descriptor was opened, not after.
    if is_alive(process):
        return descriptor
    os.close(descriptor)
    return None


def _wait_for(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


def _entries() -> Iterator[ProcessEntry]:
    for name in os.listdir(_PROC):  # noqa: PTH208 (a Path for each of hundreds of names, up to 100 times a second)
        if name.isdecimal():
            entry = read_process(int(name))
            if entry is not None:
                yield entry
