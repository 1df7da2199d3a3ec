"""Which cores fronts may use: those where no engine computes, as long as there are any.

One replica on two cores: its front stays off the engine's core, also where other processes crowd the front's own
(measured at a load average of 5: 273 tokens/s of 8 streams where a front that the kernel places has 245). Two replicas
on two cores: fronts may run anywhere. A front that is bound to the core where its neighbour's engine computes shares it
however idle the others are.

So who may use which core changes with every replica that comes and goes, and the supervisor says it, from outside. A
front that starts may use every core: its start is waited for.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from helios.worker.supervisor.process_tree import is_alive
from helios.worker.supervisor.records import ProcessIdentity, ReplicaState, ReplicaView

Cores = tuple[int, ...]

_STARTING: Final = frozenset({ReplicaState.PENDING, ReplicaState.FETCHING, ReplicaState.LOADING, ReplicaState.WARMING})


def front_cores(engine_cores: Iterable[Cores], cores: Sequence[int]) -> Cores:
    """Returns the cores for all fronts beside engines on ``engine_cores``. Pure."""
    taken = {core for one in engine_cores for core in one}
    return tuple(core for core in cores if core not in taken) or tuple(cores)


class FrontPlacement:
    """Keeps the fronts of replicas that were ready once where they may be."""

    def __init__(self, cores: Sequence[int], bind: Callable[[ProcessIdentity, Cores], None]) -> None:
        """``bind`` binds all threads of a process."""
        self._cores = tuple(cores)
        self._bind = bind
        self._bound: dict[ProcessIdentity, Cores] = {}

    def update(self, replicas: Iterable[ReplicaView], engine_cores: Mapping[str, Cores]) -> None:
        """Takes all replicas, and the engines' cores by replica: also of those that only begin to start."""
        wanted = front_cores(engine_cores.values(), self._cores)
        fronts = {view.process for view in replicas if view.process is not None and view.state not in _STARTING}
        for process in fronts:
            if self._bound.get(process) != wanted:
                self._bind(process, wanted)
        self._bound = dict.fromkeys(fronts, wanted)


def bind_process(process: ProcessIdentity, cores: Cores) -> None:
    """Binds every thread of a process to ``cores``; what they start later inherits it. Nothing where it is gone."""
    if not is_alive(process):
        return
    with contextlib.suppress(FileNotFoundError):
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), cores)
