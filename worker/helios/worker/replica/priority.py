"""Computing with what others leave: how a start that nobody waits for keeps off those that serve.

A compile takes every core that it gets for a minute and a half. Two things hold it back, since either may be without
effect, and both are given up again when the replica is ready, since it then serves like any other:

- The session's weight in the kernel's autogroups. Where they are on (most machines, outside containers), each session
  gets an equal share of a core whatever the priority of its processes, and a replica is a session: with SCHED_IDLE
  alone it took as much of a core as its neighbour, with the weight alone 3 % of it (measured).
- SCHED_IDLE, where processes are in one control group, as in a container. Only those may leave it again who may raise
  priorities; where that is not so, the replica goes without, rather than serve with it for good. Source: sched(7).

What is below a process inherits both. Linux only, like the worker.
"""

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import Final

_LOWEST_NICE: Final = 19
# The kernel takes a change of an autogroup every 100 ms of those who may not administer the machine.
_AUTOGROUP_PAUSE_SECONDS: Final = 0.11
_AUTOGROUP_TRIES: Final = 5
# A process that forks while the list is read is met by the next reading.
_LOOKS: Final = 10


def step_back() -> None:
    """Puts this process, the leader of a session with one thread, and all that it will fork behind everybody else."""
    _weigh_session(_LOWEST_NICE)
    if can_return():
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def step_forward() -> None:
    """Gives every thread of this process's session its normal priority back."""
    _weigh_session(0)
    for _ in range(_LOOKS):
        if not _free_idle_threads():
            return


def can_return() -> bool:
    """Whether this process, which has one thread, may leave SCHED_IDLE again.

    Tried by a child: what counts are capabilities of the machine and not of the user namespace that a container may be.
    """
    child = os.fork()
    if child == 0:
        # Nothing else may run in the child, whatever happens.
        status = 1
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            status = 0
        finally:
            os._exit(status)
    _, wait_status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(wait_status) == 0


def _free_idle_threads() -> int:
    """Returns how many threads of the session were still behind."""
    count = 0
    session_id = os.getsid(0)
    for process in Path("/proc").iterdir():
        # Processes come and go meanwhile.
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if not process.name.isdecimal() or os.getsid(int(process.name)) != session_id:
                continue
            for thread in (process / "task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    count += _free(int(thread.name))
    return count


def _free(thread_id: int) -> bool:
    if os.sched_getscheduler(thread_id) != os.SCHED_IDLE:
        return False
    os.sched_setscheduler(thread_id, os.SCHED_OTHER, os.sched_param(0))
    return True


def _weigh_session(nice: int) -> None:
    """Sets the weight of this process's session; nothing where the kernel has no autogroups."""
    for _ in range(_AUTOGROUP_TRIES):
        try:
            Path("/proc/self/autogroup").write_text(str(nice))
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return
            time.sleep(_AUTOGROUP_PAUSE_SECONDS)
        else:
            return
