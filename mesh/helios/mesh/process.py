"""How every Helios process runs: settings, logs, telemetry, event loop, signals, readiness, exit status.

``run`` is the last line of every ``__main__``. Exit status: 0 after a stop that was asked for, 1 after an error or
where a stop took too long, 2 for wrong settings. The process that started this one learns of readiness and of the
addresses that were taken from ``--ready-file``.
"""

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import structlog
import uvloop

from helios.mesh.errors import HeliosError
from helios.mesh.last_words import end_within
from helios.mesh.logs import setup_logs
from helios.mesh.ops import OpsServer
from helios.mesh.settings import ProcessSettings, load_settings
from helios.mesh.tasks import task_scope
from helios.mesh.telemetry import setup_telemetry

log = structlog.get_logger()
S = TypeVar("S", bound=ProcessSettings)
_GC_THRESHOLDS: Final = (10_000, 10, 50)


class Lifetime:
    """The life of a process, as its composition root sees it.

    ``group`` runs the process's background tasks: one that raises ends the process, and all are cancelled once the root
    returns.
    """

    def __init__(self, group: asyncio.TaskGroup, ready_file: Path | None, ops_address: Callable[[], str]) -> None:
        self.group = group
        self.stopping = asyncio.Event()
        self.is_ready = False
        self._ready_file = ready_file
        self._ops_address = ops_address

    async def wait_stop(self) -> None:
        """Returns when SIGTERM or SIGINT asked the process to stop."""
        await self.stopping.wait()

    def mark_ready(self, **facts: Any) -> None:
        """Says that the process serves; ``facts`` (addresses taken, for instance) go to whoever started it."""
        self.is_ready = True
        facts = {"pid": os.getpid(), "ready": True, "ops_address": self._ops_address(), **facts}
        log.info("ready", **{key: value for key, value in facts.items() if key not in ("ready", "pid")})
        if self._ready_file is not None:
            temporary = self._ready_file.with_name(f".{self._ready_file.name}.{os.getpid()}")
            temporary.write_text(json.dumps(facts) + "\n")
            temporary.replace(self._ready_file)


def run(
    name: str,
    settings_class: type[S],
    main: Callable[[S, Lifetime], Awaitable[None]],
    *,
    is_hot: bool = False,
) -> NoReturn:
    """Runs a process to its end and exits.

    ``is_hot`` is for a process that answers many small calls: it takes uvloop, and looks for garbage in cycles seldom.
    A process that starts others must not take it: uvloop forks where asyncio's own loop uses vfork, and gRPC's handlers
    of fork() then crash the child before it has begun.
    """
    ready_file, arguments = _take_ready_file(sys.argv[1:])
    settings = load_settings(settings_class, arguments)
    setup_logs(process=name, level=settings.log_level)
    shut_down_telemetry = setup_telemetry(process=name, otlp_endpoint=settings.otlp_endpoint)
    if is_hot:
        _collect_seldom()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if is_hot else None) as runner:
            runner.run(_run(settings, main, ready_file))
        status = 0
    except BaseExceptionGroup as group:
        status = _report(name, group.exceptions[0] if len(group.exceptions) == 1 else group)
    except Exception as error:  # noqa: BLE001 - the last one to see it
        status = _report(name, error)
    shut_down_telemetry()
    raise SystemExit(status)


async def _run(settings: S, main: Callable[[S, Lifetime], Awaitable[None]], ready_file: Path | None) -> None:
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(task_scope())
        ops: list[OpsServer] = []
        lifetime = Lifetime(group, ready_file, lambda: ops[0].address if ops else "")
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if not lifetime.stopping.is_set():
                lifetime.stopping.set()
                end_within(settings.stop_limit_seconds)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        if settings.ops_listen:
            server = OpsServer(settings.ops_listen, is_ready=lambda: lifetime.is_ready)
            ops.append(await stack.enter_async_context(server))
        try:
            await main(settings, lifetime)
        finally:
            lifetime.is_ready = False
            # What failed is to be started again, and must not hang while it closes.
            stop()


def _collect_seldom() -> None:
    """Leaves what was imported out of the search for cycles, and searches less often for what comes.

    A process that remembers its last requests has many objects that live long, and few cycles. With Python's thresholds
    (700, 10, 10) the proxy spent a fifth of its time on the search, up to a tenth of a second at once.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def _report(name: str, error: BaseException) -> int:
    if isinstance(error, HeliosError):
        log.error("process failed", reason=error.reason, error=error.message, metadata=error.metadata)
        sys.stderr.write(f"helios {name}: {error.message}\n")
    else:
        log.error("process failed", exc_info=error)
    return 1


def _take_ready_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    rest = [argument for argument in arguments if not argument.startswith("--ready-file=")]
    found = [argument.partition("=")[2] for argument in arguments if argument.startswith("--ready-file=")]
    return (Path(found[-1]) if found else None), rest
