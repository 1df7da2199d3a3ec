"""Processes that a benchmark starts, and their certain end: none outlives the block, whatever happened in it."""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil

# Envoy and our processes end within a second; the mesh drains first.
STOP_SECONDS = 20.0
_POLL_SECONDS = 0.02
# A mesh with one replica and vLLM's server take 0.02 of a core at rest.
_REST_SECONDS = 0.5
_REST_CORES = 0.05


class Children:
    """Starts processes, each with a log file of its own in ``logs``; on exit ends them and all their descendants.

    SIGTERM to this process ends the block as an exception would, so that a `timeout` around the benchmark leaves
    nothing behind either.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[subprocess.Popen[bytes]] = []
        self._handler: Any = None

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._handler = signal.signal(signal.SIGTERM, _exit)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for process in reversed(self._started):
                _end(process)
        finally:
            signal.signal(signal.SIGTERM, self._handler)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> psutil.Process:
        """Starts a process in a session of its own, so that Ctrl-C reaches it through this one only."""
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._started.append(process)
        return psutil.Process(process.pid)

    def wait(self, condition: Any, timeout_seconds: float, what: str) -> Any:
        """Returns the first true value of ``condition()``; fails when a child ends, and at the deadline."""
        deadline = time.monotonic() + timeout_seconds
        while not (value := condition()):
            ended = [process for process in self._started if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"not reached: {what}; {len(ended)} processes ended\n{self._last_words()}")
            time.sleep(_POLL_SECONDS)
        return value

    def wait_at_rest(self, timeout_seconds: float) -> None:
        """Returns when all processes together, descendants included, take less than a twentieth of a core.

        An engine spins for a second after its last request, in case that another comes, and would take that second
        from whoever is measured next on its core.
        """
        before = self._cpu_seconds()

        def is_at_rest() -> bool:
            nonlocal before
            time.sleep(_REST_SECONDS)
            now = self._cpu_seconds()
            spent, before = now - before, now
            return spent < _REST_SECONDS * _REST_CORES

        self.wait(is_at_rest, timeout_seconds, "all processes are at rest")

    def _cpu_seconds(self) -> float:
        tree = [process for child in self._started for process in _tree(child.pid)]
        return sum(cpu_seconds(process.pid) for process in tree)

    def _last_words(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(self._logs.glob("*.log"))
        )


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all threads: in nanoseconds, where `stat` has hundredths of a second; 0 if it ended."""
    spent = 0
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to end, kills it and what it leaves behind after the deadline."""
    tree = _tree(process.pid)[1:]
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS)
    finally:
        if process.stdin is not None:
            process.stdin.close()
    _, alive = psutil.wait_procs(tree, timeout=2)
    for orphan in alive:
        orphan.kill()
    psutil.wait_procs(alive, timeout=5)


def _exit(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)
