"""LoRA adapters of a replica: brought into the running engine, and out of it, until they are those that are wanted.

They are models of their own in the registry, and their files are on the node by leases of their own, which the
supervisor holds for as long as this replica names the revision in its statuses: an engine may drop an adapter from
memory and read it again.

What is wanted is a state and no list of steps, so a message that comes twice, late or after another one does no harm.
An adapter that can't be used is said to have failed, and nothing else: the model and its other adapters go on. A new
revision takes the name over as soon as it is loaded, and the old one ends with its last request.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from helios.mesh.errors import HeliosError, PreconditionFailed
from helios.worker.replica.adapter_state import AdapterFiles, AdapterState, AdapterStatus
from helios.worker.replica.engine import AdaptingEngine, Engine
from helios.worker.replica.gate import CallGate
from helios.worker.replica.settings import LoraAdapter
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Loaded:
    """An adapter in the engine; ``handle`` is the engine's own."""

    adapter: LoraAdapter
    handle: Any
    is_unloading: bool = False


class Adapters:
    """The adapters of one replica. One event loop uses it.

    Invariants: the gate knows exactly the names that are loaded; a revision is in ``statuses`` for as long as the
    engine may read its files; one adapter is loaded at a time.
    """

    def __init__(self, spec: ReplicaSpec, on_change: Callable[[], None]) -> None:
        """``on_change`` is called when ``statuses`` changed."""
        self._spec = spec
        self._wanted = tuple(
            AdapterFiles(adapter, spec.revision_paths.get(adapter.revision, "")) for adapter in spec.adapters
        )
        self._on_change = on_change
        self._engine: AdaptingEngine | None = None
        self._gate: CallGate | None = None
        self._loaded: dict[str, _Loaded] = {}
        self._leaving: list[_Loaded] = []
        self._loading: LoraAdapter | None = None
        self._failed: dict[LoraAdapter, HeliosError] = {}
        self._changed = asyncio.Event()

    @property
    def statuses(self) -> tuple[AdapterStatus, ...]:
        """Every adapter that is wanted, and what the engine still has of others."""
        wanted = {files.adapter for files in self._wanted}
        others = {loaded.adapter for loaded in (*self._loaded.values(), *self._leaving)} - wanted
        if self._loading is not None:
            others |= {self._loading} - wanted
        return (
            *(self._status(files.adapter) for files in self._wanted),
            *(AdapterStatus(adapter, AdapterState.UNLOADING) for adapter in sorted(others, key=str)),
        )

    def want(self, wanted: Sequence[AdapterFiles]) -> None:
        """Says which adapters there are to be; the newest word counts."""
        self._wanted = tuple(wanted)
        adapters = {files.adapter for files in wanted}
        self._failed = {adapter: error for adapter, error in self._failed.items() if adapter in adapters}
        self._changed.set()
        self._on_change()

    async def open(self, engine: Engine, gate: CallGate) -> None:
        """Loads what is wanted and on the node already, before the first request. Called once, before ``run``."""
        # One that has no adapters says so when one is wanted.
        adapting: Any = engine
        self._engine, self._gate = adapting if isinstance(adapting, AdaptingEngine) else None, gate
        while (files := self._missing()) is not None:
            await self._load(files)

    async def run(self) -> None:
        """Follows what is wanted until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                for name in self._loaded.keys() - {files.adapter.name for files in self._wanted}:
                    self._leaving.append(self._loaded.pop(name))
                self._tell_gate()
                for loaded in self._leaving:
                    if not loaded.is_unloading:
                        loaded.is_unloading = True
                        group.create_task(self._unload(loaded), name=f"unload {loaded.adapter.name}")
                files = self._missing()
                if files is not None:
                    await self._load(files)
                else:
                    await self._changed.wait()

    def _missing(self) -> AdapterFiles | None:
        """Returns the first adapter that is wanted, not loaded, on the node, and worth a try."""
        for files in self._wanted:
            loaded = self._loaded.get(files.adapter.name)
            is_there = loaded is not None and loaded.adapter == files.adapter
            if files.path and not is_there and files.adapter not in self._failed:
                return files
        return None

    async def _load(self, files: AdapterFiles) -> None:
        adapter = self._loading = files.adapter
        try:
            if self._engine is None:
                raise PreconditionFailed(
                    f"the engine {self._spec.engine} has no LoRA adapters", reason="ADAPTERS_UNSUPPORTED"
                )
            handle = await self._engine.load_adapter(adapter.name, files.path)
        except HeliosError as error:
            if any(wanted.adapter == adapter for wanted in self._wanted):
                self._failed[adapter] = error
            log.warning("adapter not loaded", adapter=adapter.name, reason=error.reason, error=error.message)
        else:
            old = self._loaded.get(adapter.name)
            self._loaded[adapter.name] = _Loaded(adapter, handle)
            if old is not None:
                self._leaving.append(old)
            self._tell_gate()
            log.info("adapter loaded", adapter=adapter.name, model=adapter.model, revision=adapter.revision)
        finally:
            self._loading = None
        self._on_change()

    async def _unload(self, loaded: _Loaded) -> None:
        adapter = loaded.adapter
        assert self._engine is not None
        try:
            await self._engine.unload_adapter(adapter.name, loaded.handle)
        except HeliosError as error:
            # It stays in the engine, where nobody asks for it, and in the statuses, so that its files stay, too.
            log.warning("adapter not unloaded", adapter=adapter.name, revision=adapter.revision, error=error.message)
            return
        self._leaving.remove(loaded)
        log.info("adapter unloaded", adapter=adapter.name, model=adapter.model, revision=adapter.revision)
        self._on_change()

    def _tell_gate(self) -> None:
        assert self._gate is not None
        self._gate.set_adapters(self._loaded)

    def _status(self, adapter: LoraAdapter) -> AdapterStatus:
        loaded, error = self._loaded.get(adapter.name), self._failed.get(adapter)
        if loaded is not None and loaded.adapter == adapter:
            return AdapterStatus(adapter, AdapterState.LOADED)
        if error is not None:
            return AdapterStatus(adapter, AdapterState.FAILED, error.reason, error.message)
        return AdapterStatus(adapter, AdapterState.LOADING)
