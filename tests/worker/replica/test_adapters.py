"""What a replica says of its adapters while one is loaded that is not wanted any more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from helios.mesh.errors import PreconditionFailed
from helios.worker.replica.adapter_state import AdapterFiles, AdapterState
from helios.worker.replica.adapters import Adapters
from helios.worker.replica.gate import CallGate
from helios.worker.replica.ledger import RequestLedger
from helios.worker.replica.settings import LoraAdapter
from helios.worker.replica.spec import ReplicaSpec

PIRATE = LoraAdapter("pirate", "pirate-lora", "sha256:a")
FILES = AdapterFiles(PIRATE, "/a")


class SlowEngine:
    """Loads when it is told to; ``fails`` loads end badly."""

    def __init__(self, *, fails: int = 0) -> None:
        self.fails = fails
        self.loads = 0
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def load_adapter(self, name: str, path: str) -> Any:
        self.loads += 1
        self.begun.set()
        await self.may_end.wait()
        if self.loads <= self.fails:
            raise PreconditionFailed(f"no file {path}", reason="BAD_ADAPTER")
        return name

    async def unload_adapter(self, name: str, loaded: Any) -> None:
        pass


@asynccontextmanager
async def loading(engine: Any) -> AsyncIterator[Adapters]:
    """Adapters of a replica that just loads one."""
    spec = ReplicaSpec(replica_id="r", model="m", revision="sha256:0", model_path="/m", created_at=datetime.now(UTC))
    subject = Adapters(spec, on_change=lambda: None)
    gate = CallGate(names=("m",), revision="sha256:0", ledger=RequestLedger(), on_change=lambda: None)
    await subject.open(engine, gate)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(subject.run())
        subject.want([FILES])
        async with asyncio.timeout(5):
            await engine.begun.wait()
            yield subject
        running.cancel()


async def until(subject: Adapters, *states: AdapterState) -> None:
    while tuple(status.state for status in subject.statuses) != states:
        await asyncio.sleep(0.001)


async def test_an_adapter_is_named_while_the_engine_reads_it_though_it_is_not_wanted_any_more() -> None:
    engine = SlowEngine()
    async with loading(engine) as subject:
        subject.want([])
        # Its files go when it is named no more.
        assert [(status.adapter, status.state) for status in subject.statuses] == [(PIRATE, AdapterState.UNLOADING)]
        engine.may_end.set()
        await until(subject)


async def test_a_failure_of_what_was_not_wanted_any_more_does_not_count_when_it_is_wanted_again() -> None:
    engine = SlowEngine(fails=1)
    async with loading(engine) as subject:
        subject.want([])
        engine.may_end.set()
        await until(subject)
        subject.want([FILES])
        await until(subject, AdapterState.LOADED)
        assert engine.loads == 2
