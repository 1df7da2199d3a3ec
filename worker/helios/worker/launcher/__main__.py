"""``python -m helios.worker.launcher --control-fd N``: imports everything, then forks replicas on request.

With several sockets it becomes as many launchers, all but one of them forks that share what was imported.

The composition root of the launcher process. Environment variables that libraries read at import are set by whoever
starts it (``client.launcher_environment``), because several are read before this module runs.
"""

import argparse
import gc
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from helios.mesh.logs import setup_logs
from helios.worker.launcher.zygote import Zygote
from helios.worker.replica import process
from helios.worker.replica.scratch import sweep_scratch
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()


def main() -> None:
    """Imports, freezes, serves."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="helios.worker.launcher", description=__doc__)
    parser.add_argument(
        "--control-fd", type=int, required=True, action="append", help="inherited end of a socketpair, one a launcher"
    )
    parser.add_argument("--engine", default="vllm", help="whose libraries to import")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    arguments = parser.parse_args()
    setup_logs(process="launcher", level=arguments.log_level)
    controls = [socket.socket(fileno=descriptor) for descriptor in arguments.control_fd]
    for control in controls:
        control.set_inheritable(False)

    process.preload(arguments.engine)
    sweep_scratch()
    # Garbage of the imports is collected once, and what stays is put out of the collector's sight: no collection in a
    # child then writes to, and so copies, the pages it shares with this process.
    gc.collect()
    gc.freeze()
    gc.disable()
    control = _fork_others(controls)
    import_seconds = time.monotonic() - started
    threads = len(list(Path("/proc/self/task").iterdir()))
    log.info("launcher ready", pid=os.getpid(), import_seconds=round(import_seconds, 3), thread_count=threads)
    if threads != 1:
        log.warning("launcher has more than one thread: a fork copies only the one that forks", thread_count=threads)
    Zygote(control, _child_main, _prepare).run(import_seconds)


def _fork_others(controls: list[socket.socket]) -> socket.socket:
    """Forks a launcher for each socket but the first; returns the calling process's own, in each of them."""
    own, *others = controls
    for other in others:
        if os.fork() == 0:
            own.close()
            for later in others[others.index(other) + 1 :]:
                later.close()
            return other
        other.close()
    return own


def _child_main(spec: ReplicaSpec, requested_ns: int) -> None:
    process.run(spec, requested_ns)


def _prepare(spec: ReplicaSpec) -> Callable[[], None] | None:
    work = None
    try:
        work = process.prepare(spec)
    except Exception as error:  # noqa: BLE001  the replica itself says what is wrong with its model
        log.warning("next start not prepared", model=spec.model, error=str(error))
    # What is kept is shared by the children, and no collection of theirs is to look at it.
    gc.collect()
    gc.freeze()
    return work


if __name__ == "__main__":
    main()
    sys.exit(0)
