"""The processes of a mesh: started, watched, restarted when they die, stopped in order.

A child is restarted with exponential back-off, for ever: what crashes comes back, and ``helios status`` shows how often
it did. Children are told apart from strangers by pid and start time. The parent is a child subreaper: when a worker
dies, its replicas become children of this process, which reaps them when they end but leaves them alone, so that the
next worker can take them over.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import structlog

from helios.cli.log_files import tail
from helios.cli.state import ProcessRecord, is_same_process, process_started_at
from helios.mesh.errors import Unavailable

log = structlog.get_logger()

_PR_SET_CHILD_SUBREAPER: Final = 36
_POLL_SECONDS: Final = 0.05
_BACKOFF_BASE_SECONDS: Final = 0.2
_BACKOFF_CAP_SECONDS: Final = 5.0
# A child that lived this long has recovered; its next crash is met with the shortest wait.
_SETTLED_SECONDS: Final = 30.0
# Deaths before the first readiness after which a start is given up.
_GIVE_UP_AFTER: Final = 3
# A process that sees that its parent is gone needs some milliseconds to end; a busy machine, some hundred.
_ORPHAN_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start a process and how to know that it serves."""

    name: str
    arguments: Sequence[str]
    log_path: Path
    ready_path: Path | None = None
    """File that the process writes its ``ready`` line to."""
    probe: Callable[[], Awaitable[bool]] | None = None
    """For a process that writes no such file: says whether it serves."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_seconds: float = 15.0
    """From SIGTERM to SIGKILL."""


class Child:
    """One process, over its restarts."""

    def __init__(self, spec: ChildSpec, on_change: Callable[[], None]) -> None:
        self.spec = spec
        self.facts: dict[str, Any] = {}
        self._on_change = on_change
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._state = "starting"
        self._restart_count = 0
        self._detail = ""
        self._stopping = asyncio.Event()

    @property
    def record(self) -> ProcessRecord:
        """The child as mesh.json has it."""
        pid = self._process.pid if self._process else 0
        ops_address = str(self.facts.get("ops_address", ""))
        return ProcessRecord(
            self.spec.name, self._state, pid, self._started_at, self._restart_count, ops_address, self._detail
        )

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process else None

    @property
    def is_ready(self) -> bool:
        """Whether the process serves now."""
        return self._state == "ready"

    async def run(self) -> None:
        """Keeps the process running until ``stop`` was called. Cancelling does not stop the process."""
        failures = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._start()
            except OSError as error:
                # No process or no file to be had now: like a death, it may pass.
                self._detail = f"can't be started: {error.strerror}"
            else:
                await self._watch()
            if self._stopping.is_set():
                break
            failures = 1 if time.monotonic() - started > _SETTLED_SECONDS else failures + 1
            self._restart_count += 1
            delay = backoff_seconds(failures)
            log.warning("process died", name=self.spec.name, status=self._detail, restart_in_seconds=delay)
            self._set("restarting")
            await asyncio.sleep(delay)
        self._set("stopped")

    async def stop(self, deadline: float) -> None:
        """Asks the process to end; kills it when its own time is over, or at the deadline (``time.monotonic()``) of the
        whole stop. Returns when it is gone.
        """
        self._stopping.set()
        process = self._process
        if process is None or process.poll() is not None:
            self._set("stopped")
            return
        process.terminate()
        killed_at = min(time.monotonic() + self.spec.stop_seconds, deadline)
        while (status := process.poll()) is None:
            if time.monotonic() > killed_at:
                process.kill()
                killed_at = float("inf")
            await asyncio.sleep(_POLL_SECONDS)
        if status not in (0, -signal.SIGTERM):
            # Its last words, if it had any, say what it waited for (helios.mesh.last_words).
            path = str(self.spec.log_path)
            log.warning("process did not end by itself", name=self.spec.name, status=status, log=path)
        self._set("stopped")

    def _start(self) -> None:
        if self.spec.ready_path is not None:
            self.spec.ready_path.unlink(missing_ok=True)
        with self.spec.log_path.open("ab") as log_file:
            self._process = subprocess.Popen(
                list(self.spec.arguments),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=child_environment(self.spec.environment),
                # Ctrl-C on the terminal goes to this process alone, which stops the others in order.
                start_new_session=True,
            )
        self._started_at = process_started_at(self._process.pid) or 0.0
        self._set("restarting" if self._restart_count else "starting")

    async def _watch(self) -> None:
        process = self._process
        if process is None:
            return
        is_ready = False
        while (status := process.poll()) is None:
            if not is_ready and await self._is_serving():
                is_ready = True
                self._set("ready")
            await asyncio.sleep(_POLL_SECONDS)
        self._detail = f"signal {-status}" if status < 0 else f"exit status {status}"

    async def _is_serving(self) -> bool:
        if self.spec.probe is not None:
            return await self.spec.probe()
        if self.spec.ready_path is None:
            return True
        try:
            self.facts = json.loads(self.spec.ready_path.read_text())
        except (FileNotFoundError, ValueError):
            return False
        return bool(self.facts.get("ready"))

    def _set(self, state: str) -> None:
        self._state = state
        self._on_change()


def backoff_seconds(failure_count: int) -> float:
    """Returns how long to wait after so many deaths in a row, 1 or more."""
    # The exponent is bounded: after a thousand deaths (an hour and a half) the power would be beyond any float.
    return min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2.0 ** min(failure_count - 1, 30))


async def wait_all_ready(children: Sequence[Child], *, timeout_seconds: float) -> None:
    """Returns when every child serves.

    Raises Unavailable, with the end of the logs, where one dies again and again or the time is over.
    """
    deadline = time.monotonic() + timeout_seconds
    while late := [child for child in children if not child.is_ready]:
        crashing = [child for child in late if child.record.restart_count >= _GIVE_UP_AFTER]
        if crashing or time.monotonic() > deadline:
            what = "keeps dying" if crashing else f"did not become ready in {timeout_seconds:.0f} s"
            blamed = crashing or late
            tails = "\n".join(f"--- {child.spec.log_path}\n{tail(child.spec.log_path, 8)}" for child in blamed)
            raise Unavailable(f"{', '.join(child.spec.name for child in blamed)} {what}\n{tails}")
        await asyncio.sleep(_POLL_SECONDS)


def become_subreaper() -> None:
    """Makes orphaned descendants children of this process (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


async def reap_orphans(own_pids: Callable[[], set[int]]) -> None:
    """Collects the exit status of adopted processes that ended, for ever; the children's own are left to their
    watchers.
    """
    while True:
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error, ChildProcessError):
                if process.pid not in own_pids() and process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, os.WNOHANG)  # noqa: ASYNC222 - does not wait
        await asyncio.sleep(1.0)


def kill_orphans(own_pids: set[int], deadline: float) -> list[int]:
    """Ends what is left below this process at the end of a stop, and returns the pids of what had to be killed.

    A worker that was killed leaves its replicas, and those last for a minute without one. What is about to end by
    itself, since its parent is gone, is let do so. Blocks, at most until the deadline (``time.monotonic()``); the dead
    are not waited for to the last, since one that computes with what others leave also dies with that.
    """
    _, left = psutil.wait_procs(_living_descendants(own_pids), timeout=_patience(deadline))
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_patience(deadline))
    return [process.pid for process in left]


def _patience(deadline: float) -> float:
    return min(_ORPHAN_SECONDS, max(0.0, deadline - time.monotonic()))


def _living_descendants(own_pids: set[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.pid not in own_pids and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_leftovers(records: Sequence[ProcessRecord], *, timeout_seconds: float) -> int:
    """Ends the processes of a mesh whose parent was killed: SIGTERM, then SIGKILL; returns how many there were.

    Blocks up to the timeout.
    """
    left = []
    for record in records:
        with contextlib.suppress(psutil.Error):
            if is_same_process(record.pid, record.started_at):
                process = psutil.Process(record.pid)
                process.send_signal(signal.SIGTERM)
                left.append(process)
    _, alive = psutil.wait_procs(left, timeout=timeout_seconds)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=2.0)
    return len(left)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a child: this process's own and ``extra``."""
    return {**dict(os.environ), **extra}  # noqa: TID251 - handed on whole, nothing is read
