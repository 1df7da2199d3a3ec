"""The loop of the launcher: read requests, fork, report and reap the children.

One thread and no event loop: whatever runs here is copied into every replica, so there must be nothing that a fork
would break. Children are watched by pidfd in the same poll as the control socket, so no signal handler is needed.
"""

import ctypes
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from helios.mesh.errors import Corrupted, InvalidRequest
from helios.worker.launcher.messages import Decoder, Exited, Fork, Forked, Message, Ready, Refused, encode
from helios.worker.replica.scratch import remove_scratch
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()

_READ_BYTES: Final = 64 << 10
# Source: linux/prctl.h.
_PR_SET_PDEATHSIG: Final = 1

# A launcher that prepares can't fork. After this long without a request the next one is not likely to be near.
_IDLE_SECONDS: Final = 1.0

ChildMain = Callable[[ReplicaSpec, int], None]
Work = Callable[[], None]
Prepare = Callable[[ReplicaSpec], Work | None]


@dataclass(frozen=True, slots=True)
class _Child:
    """A helper is no replica: it works for the next ones, nobody is told of it, and it ends with the launcher."""

    pid: int
    start_ticks: int
    pidfd: int
    is_helper: bool = False


class Zygote:
    """Serves the control socket until its other end is closed. Not reusable."""

    def __init__(self, control: socket.socket, child_main: ChildMain, prepare: Prepare = lambda _: None) -> None:
        """Takes what runs in it.

        Args:
            control: The socket to the supervisor.
            child_main: ``child_main(spec, requested_ns)`` is the whole life of a forked child; it must not return
                normally.
            prepare: Called in this process some time after a fork; takes below a second,
                starts no thread and raises nothing. What it returns is run in a helper, one at a time: while there is
                one, the next model has to wait for its next start.
        """
        self._control = control
        self._child_main = child_main
        self._prepare = prepare
        self._forked_last: ReplicaSpec | None = None
        self._decoder = Decoder()
        self._children: dict[int, _Child] = {}
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self, import_seconds: float) -> None:
        """Returns when the supervisor has closed the socket; replicas live on."""
        if not self._send(Ready(import_seconds, os.getpid())):
            return
        while True:
            events = self._poll.poll(None if self._forked_last is None else _IDLE_SECONDS * 1000)
            if not events and self._forked_last is not None:
                spec, self._forked_last = self._forked_last, None
                work = self._prepare(spec)
                if work is not None and not any(child.is_helper for child in self._children.values()):
                    self._fork_helper(work)
            for descriptor, _ in events:
                if descriptor != self._control.fileno():
                    self._reap(self._children[descriptor])
                elif not self._read():
                    return

    def _read(self) -> bool:
        try:
            data = self._control.recv(_READ_BYTES)
        except ConnectionError:
            return False
        if not data:
            return False
        try:
            for message in self._decoder.feed(data):
                if isinstance(message, Fork):
                    self._send(self._fork(message))
        except Corrupted as error:
            log.exception("control socket is unusable", error=str(error))
            return False
        return True

    def _fork(self, request: Fork) -> Message:
        try:
            spec = ReplicaSpec.from_document(request.spec)
            pid = os.fork()
        except (InvalidRequest, OSError) as error:
            return Refused(request.number, str(error))
        if pid == 0:
            self._become(lambda: self._child_main(spec, request.requested_ns), "replica failed")
        child = self._watch(pid)
        self._forked_last = spec
        log.info("replica forked", replica=spec.replica_id, pid=pid)
        return Forked(request.number, pid, child.start_ticks)

    def _fork_helper(self, work: Work) -> None:
        launcher = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            log.warning("no helper for the next start", error=str(error))
            return
        if pid == 0:
            self._become(lambda: _help(work, launcher), "helper failed")
        self._watch(pid, is_helper=True)
        log.info("helper forked", pid=pid)

    def _watch(self, pid: int, *, is_helper: bool = False) -> _Child:
        child = _Child(pid, read_start_ticks(pid), os.pidfd_open(pid), is_helper)
        self._children[child.pidfd] = child
        self._poll.register(child.pidfd, select.POLLIN)
        return child

    def _become(self, main: Work, failure: str) -> None:
        # Only this process's own copies: the launcher keeps its socket and its other children.
        self._control.close()
        for child in self._children.values():
            os.close(child.pidfd)
        status = 1
        try:
            main()
            status = 0
        except Exception:  # raised again; the last lines of a replica's log are what people are told of its end
            log.exception(failure)
            raise
        finally:
            # Never back into the launcher's loop, and no exit handler of the launcher.
            os._exit(status)

    def _reap(self, child: _Child) -> None:
        self._poll.unregister(child.pidfd)
        del self._children[child.pidfd]
        os.close(child.pidfd)
        _, wait_status = os.waitpid(child.pid, 0)
        status = os.waitstatus_to_exitcode(wait_status)
        remove_scratch(child.pid)
        if child.is_helper:
            log.info("helper exited", pid=child.pid, status=status)
            return
        log.info("replica exited", pid=child.pid, status=status)
        self._send(Exited(child.pid, child.start_ticks, status))

    def _send(self, message: Message) -> bool:
        try:
            self._control.sendall(encode(message))
        except ConnectionError:
            return False
        return True


def _help(work: Work, launcher: int) -> None:
    """The life of a helper: a session of its own, which a launcher that ends takes with it."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have ended before that.
    if os.getppid() == launcher:
        work()


def read_start_ticks(pid: int) -> int:
    """Returns the start time of a process in clock ticks since boot, 0 where it is gone.

    Source: proc_pid_stat(5), field 22. The second field is the name in parentheses and may hold spaces.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[19])
