"""The life of a forked child, from the fork to its exit: session, log file, lifeline, then the replica itself.

Also says what the launcher imports for an engine, so that the launcher knows engines only by name.
"""

import asyncio
import gc
import importlib
import os
import signal
import time
from collections.abc import Callable

import structlog
import uvloop

from helios.mesh.logs import setup_logs
from helios.worker.replica.engines import engine_module
from helios.worker.replica.lifeline import Lifeline
from helios.worker.replica.phases import write_phase
from helios.worker.replica.priority import step_back
from helios.worker.replica.scratch import make_scratch, remove_scratch
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.replica.start import EngineStart

log = structlog.get_logger()


def preload(engine: str) -> None:
    """Imports all that a replica of an engine needs, in the launcher, once."""
    engine_module(engine).preload()
    importlib.import_module("helios.worker.replica.main")


def prepare(spec: ReplicaSpec) -> Callable[[], None] | None:
    """Does in the launcher what the next replica of a model will not have to do; engines need not know how.

    Returns what is to be done in a child of the launcher, because it takes long or changes the process.
    """
    work: Callable[[], None] | None = getattr(engine_module(spec.engine), "prepare", lambda _: None)(spec)
    return work


def run(spec: ReplicaSpec, requested_ns: int) -> None:
    """Lives as a replica; returns when it was told to end, raises SystemExit when it failed.

    Called in a freshly forked child that has one thread. ``requested_ns`` is when the fork was asked for.
    """
    forked_at = time.monotonic()
    os.setsid()
    if spec.is_background:
        step_back()
    # The launcher ignores none, but whoever started it may have.
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    _redirect_output(spec.log_path)
    setup_logs(process="replica", level=spec.log_level)  # type: ignore[arg-type]
    structlog.contextvars.bind_contextvars(replica=spec.replica_id)
    # The heap was frozen by the launcher; what a replica allocates is collected again, by its own small generations.
    gc.enable()
    make_scratch(os.getpid())
    Lifeline()
    if spec.device_uuids:
        # Before anything touches CUDA, which reads it once. By uuid: a MIG slice has no number.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(spec.device_uuids)  # noqa: TID251
    start = EngineStart(spec)
    write_phase(start.phase_writer, "prepare", forked_at, time.monotonic())
    start.run_until_forked()
    main = importlib.import_module("helios.worker.replica.main")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        is_clean = runner.run(main.serve(spec, start, requested_at=requested_ns / 1e9, forked_at=forked_at))
    remove_scratch(os.getpid())
    if not is_clean:
        raise SystemExit(1)


def _redirect_output(path: str) -> None:
    if not path:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
