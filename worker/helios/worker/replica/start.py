"""Starting the engine beside the event loop, so that the supervisor hears of each phase while the weights load.

The engine forks its own processes, which must happen before gRPC exists in this process. So the engine is made in a
thread of its own; the event loop begins only when that thread has forked, and from then on both run.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

from helios.mesh.errors import HeliosError
from helios.worker.artifacts.requests import ArtifactRequest
from helios.worker.early.asking import Arrivals
from helios.worker.replica.engine import Engine, EngineHooks
from helios.worker.replica.engines import engine_module
from helios.worker.replica.loss_pipe import LossPipe
from helios.worker.replica.spec import ReplicaSpec

# Reading config and tokenizer before the fork takes a second or two, on a slow disk some ten.
_FORK_SECONDS: Final = 120.0
_READ_BYTES: Final = 4096


class EngineStart:
    """An engine that is being made.

    Attributes:
        engine: Done when the engine takes requests, or with what stopped it. Its callbacks run in the starting thread.
        phase_descriptor: Read end of a pipe with a JSON line ``[phase, began_at, ended_at]`` for each phase.
        phase_writer: The other end of that pipe.
        losses: What the engine's KV cache loses.
        ended_at: Monotonic time at which ``engine`` was done.
        failure: Reason and message of what a process of the engine died of; None where none said anything.
        on_load: Called in the event loop when the engine's load changed, once it is set.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        self.engine: Future[Engine] = Future()
        self.phase_descriptor, self.phase_writer = os.pipe()
        os.set_blocking(self.phase_descriptor, False)
        self.losses = LossPipe()
        self.ended_at = 0.0
        self.failure: tuple[str, str] | None = None
        self.on_load: Callable[[], None] | None = None
        self._spec = spec
        self._forked = threading.Event()
        self._hooks = EngineHooks(
            on_forked=self._forked.set,
            on_load=self._report_load,
            phase_descriptor=self.phase_writer,
            losses=self.losses.writer,
        )
        self._buffer = b""
        self._thread = threading.Thread(target=self._make, name="engine start", daemon=True)

    def run_until_forked(self) -> None:
        """Starts, and returns when the engine has forked or failed. Blocks: call it before there is a loop."""
        self._thread.start()
        self._forked.wait(_FORK_SECONDS)

    @property
    def artifacts(self) -> Sequence[ArtifactRequest]:
        """What the engine uses or made that other starts can use; complete when ``engine`` is done."""
        return self._hooks.artifacts

    def read_phases(self) -> list[tuple[str, float, float]]:
        """Returns the phases that ended since the last call, without waiting."""
        try:
            while data := os.read(self.phase_descriptor, _READ_BYTES):
                self._buffer += data
        except BlockingIOError:
            pass
        *lines, self._buffer = self._buffer.split(b"\n")
        entries = list(map(json.loads, lines))
        phases = [entry for entry in entries if isinstance(entry, list)]
        failures = [(str(entry["reason"]), str(entry["message"])) for entry in entries if isinstance(entry, dict)]
        # The first process that fails takes the others with it.
        self.failure = self.failure or next(iter(failures), None)
        return [(str(name), float(began), float(ended)) for name, began, ended in phases]

    def why(self, error: BaseException) -> tuple[str, str]:
        """Returns reason and message of a start that failed with ``error``; call ``read_phases`` before."""
        if self.failure is not None:
            return self.failure
        if isinstance(error, HeliosError):
            return error.reason, error.message
        return "ENGINE_START_FAILED", f"{type(error).__name__}: {error}"

    def _report_load(self) -> None:
        if self.on_load is not None:
            self.on_load()

    def _make(self) -> None:
        try:
            engine = engine_module(self._spec.engine).build(self._spec, self._hooks)
            self._wait_lent(engine)
        except Exception as error:  # noqa: BLE001  handed to whoever waits for the engine
            self.ended_at = time.monotonic()
            self.engine.set_exception(error)
        else:
            self.ended_at = time.monotonic()
            self.engine.set_result(engine)
        finally:
            self._forked.set()

    def _wait_lent(self, engine: Engine) -> None:
        """Waits until a model that was loaded early is lent: only then is it known to be what it should be."""
        spec = self._spec
        if not spec.early_door:
            return
        try:
            with self._hooks.phase("commit"):
                Arrivals(spec.early_door, spec.replica_id, spec.model_path).wait_whole()
        except BaseException:
            engine.close()
            raise
