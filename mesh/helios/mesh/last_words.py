"""The end of a process, bounded: what hangs when the time of a stop is over is named, and the process ends anyway.

A stop that hangs is seen by its parent only, which kills it and learns nothing. So the process speaks first, in two
ways. The event loop names the tasks that still wait and where: calls by their path, everything else by its name. A loop
that does not turn any more, a thread that the interpreter waits for, or a destructor at its very end is left to
faulthandler, whose watchdog needs neither loop nor interpreter: it writes the stack of each thread and ends the
process.
"""

import asyncio
import faulthandler
from types import FrameType
from typing import Any, Final

import structlog

log = structlog.get_logger()

# The tasks are named this long before the end: what says so must still be written.
REPORT_SECONDS: Final = 0.5
# A server may have thousands of calls; the first ones say what they wait for.
_MOST_TASKS: Final = 50
# What a coroutine, a generator and an asynchronous generator call their frame and what they wait for.
_FRAMES: Final = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


def end_within(seconds: float) -> None:
    """Ends this process, with exit status 1 and its last words, unless it has ended by itself until then.

    For processes that are to end: nothing takes it back. Call it on the event loop; a later call replaces the watchdog,
    not the report.
    """
    asyncio.get_running_loop().call_later(max(0.0, seconds - REPORT_SECONDS), _report)
    faulthandler.dump_traceback_later(max(seconds, REPORT_SECONDS), exit=True)


def waiting_tasks() -> list[str]:
    """Names the tasks of this loop, each with the functions and lines that wait, from the outermost to the one that
    does.
    """
    return sorted(f"{task.get_name()}: {_place(task.get_coro())}" for task in asyncio.all_tasks())


def _report() -> None:
    tasks = waiting_tasks()
    log.error("stop hangs", tasks=tasks[:_MOST_TASKS], task_count=len(tasks))


def _place(work: Any) -> str:
    places = []
    while work is not None:
        frame, work = _step(work)
        if frame is not None:
            places.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
    return " > ".join(places) or "has not begun, or waits outside of Python"


def _step(work: Any) -> tuple[FrameType | None, Any]:
    for frame_name, next_name in _FRAMES:
        frame = getattr(work, frame_name, None)
        if frame is not None:
            return frame, getattr(work, next_name)
    return None, None
