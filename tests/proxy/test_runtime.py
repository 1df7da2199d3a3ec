"""What the runtime has written, and in which order."""

import asyncio
import errno
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from envoy.service.discovery.v3 import discovery_pb2

from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.mesh.errors import Unavailable
from helios.mesh.names import EXPRESS_FILTER
from helios.mesh.tasks import task_scope
from helios.mesh.xds.server import EXTENSIONS_TYPE, XdsServer
from helios.mesh.xds.state import ExpressRoute
from helios.proxy import actions
from helios.proxy.express.lane import ExpressPolicy
from helios.proxy.fleet.servicer import FleetServicer
from helios.proxy.runtime import Runtime
from helios.proxy.scaling.decisions import Scaled
from helios.proxy.swap import SwapFailures
from helios.proxy.traffic import RoutingPolicy
from tests.proxy.fakes import until
from tests.proxy.support import core, entry, hello, policy, replica


class NoEnvoys:
    def publish(self, endpoints: Iterable[str]) -> int:
        return len(list(endpoints))

    def open(self) -> None: ...

    async def wait_acked(self, version: int, deadline: float) -> None: ...

    def publish_express(self, routes: Iterable[ExpressRoute]) -> int:
        return len(list(routes))

    async def wait_express_acked(self, version: int, deadline: float) -> None: ...


class SlowDisk:
    """Its first write of cordons takes until `go_on`."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.begun = asyncio.Event()
        self.written: list[frozenset[str]] = []

    async def save(self, worker_ids: frozenset[str]) -> None: ...

    async def save_swap_failures(self, failures: Sequence[SwapFailures]) -> None: ...

    async def save_starts(self, document: Mapping[str, Any]) -> None: ...

    async def save_decisions(self, documents: Sequence[Mapping[str, Any]]) -> None: ...

    async def save_cordons(self, own: Iterable[str], shared: Iterable[str]) -> None:
        is_first = not self.begun.is_set()
        self.begun.set()
        if is_first:
            await self.go_on.wait()
        assert not frozenset(shared)
        self.written.append(frozenset(own))


async def test_the_last_cordon_is_the_one_that_stays_written() -> None:
    subject, disk = core(), SlowDisk()
    runtime = Runtime(subject, publisher=NoEnvoys(), memory=disk)
    for worker_id in ("v", "w"):
        subject.worker_hello(hello(worker_id), 0.0)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(runtime.cordons.change("v", is_cordoned=True))
        await disk.begun.wait()
        second = group.create_task(runtime.cordons.change("w", is_cordoned=True))
        # It has had its turn, and waits for the first one.
        await asyncio.sleep(0)
        assert not second.done()
        disk.go_on.set()
    assert disk.written == [{"v"}, {"v", "w"}]


class FullDisk(SlowDisk):
    """Takes nothing the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.kept: set[str] = set()

    def _write(self, what: str) -> None:
        self.asked.append(what)
        if self.asked.count(what) == 1:
            raise OSError(errno.ENOSPC, "no space left on device")
        self.kept.add(what)

    async def save(self, worker_ids: frozenset[str]) -> None:
        assert worker_ids == {"w"}
        self._write("workers")

    async def save_swap_failures(self, failures: Sequence[SwapFailures]) -> None:
        self._write("swaps")

    async def save_decisions(self, documents: Sequence[Mapping[str, Any]]) -> None:
        assert [document["model"] for document in documents] == ["m"]
        self._write("decisions")


async def test_a_full_disk_ends_no_proxy_and_is_written_to_when_it_has_room() -> None:
    subject, disk = core(), FullDisk()
    runtime = Runtime(subject, publisher=NoEnvoys(), memory=disk)
    async with task_scope() as group:
        group.create_task(runtime.run())
        runtime.apply(subject.worker_hello(hello("w"), 0.0))
        runtime.apply([actions.WorkersChanged(), actions.SwapFailuresChanged()])
        subject.lifecycle.wants.decisions.add(Scaled(0.0, "m", 0, 1, "asked for", is_advice=False))
        runtime.apply(subject.tick(1.0))
        await until(lambda: disk.kept == {"workers", "swaps", "decisions"}, seconds=30)


class DeafEnvoys(NoEnvoys):
    """Takes nothing up, however often it is asked; keeps how often it was, by what."""

    def __init__(self) -> None:
        self.asked = {"endpoints": 0, "express lane": 0}

    async def wait_acked(self, version: int, deadline: float) -> None:
        await self._refuse("endpoints", version)

    async def wait_express_acked(self, version: int, deadline: float) -> None:
        await self._refuse("express lane", version)

    async def _refuse(self, what: str, version: int) -> None:
        self.asked[what] += 1
        if self.asked[what] > 2:
            await asyncio.Event().wait()
        raise Unavailable("not in time", metadata={"version": str(version), "lagging": "edge"})


async def test_endpoints_and_an_express_lane_that_no_envoy_takes_up_end_nothing() -> None:
    envoys = DeafEnvoys()
    # It may have had a lane before it was started again, which is to be withdrawn.
    settings = replace(policy(), routing=RoutingPolicy(express=ExpressPolicy(1, 1.0)), resync_seconds=0.0)
    runtime = Runtime(core(settings, known_workers=["w"]), publisher=envoys, memory=SlowDisk())
    async with task_scope() as group:
        group.create_task(runtime.run())
        runtime.apply(runtime.core.worker_hello(hello("w", replicas=(replica("r"),)), 0.0))
        await until(lambda: min(envoys.asked.values()) > 2, seconds=20)


async def test_a_proxy_that_remembers_nothing_takes_back_what_envoys_still_have_of_its_lane() -> None:
    # Its store is lost, or it is to have no lane any more: with what an earlier run said, Envoy would go on sending to
    # replicas that may be gone, and the picker would never hear of it.
    xds = XdsServer()
    runtime = Runtime(core(), publisher=xds, memory=SlowDisk())
    answers: asyncio.Queue[Any] = asyncio.Queue()
    asking: asyncio.Queue[Any] = asyncio.Queue()
    known = {EXPRESS_FILTER: "7"}
    asking.put_nowait(
        discovery_pb2.DeltaDiscoveryRequest(
            type_url=EXTENSIONS_TYPE, resource_names_subscribe=[EXPRESS_FILTER], initial_resource_versions=known
        )
    )
    async with asyncio.timeout(20), task_scope() as group:
        group.create_task(runtime.run())
        group.create_task(xds.DeltaAggregatedResources(_asked(asking), _Answers(answers)))
        answer = await answers.get()
    assert [resource.name for resource in answer.resources] == [EXPRESS_FILTER]


async def _asked(queue: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while True:
        yield await queue.get()


class _Answers:
    def __init__(self, answers: asyncio.Queue[Any]) -> None:
        self._answers = answers

    async def write(self, message: Any) -> None:
        await self._answers.put(message)


async def test_a_worker_is_believed_of_its_own_replicas_only() -> None:
    subject = core()
    subject.models_replaced([entry("m", min_replicas=1)], 0.0, is_synced=True)
    subject.worker_hello(hello(replicas=(replica(),)), 0.0)
    subject.worker_hello(hello("other"), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    servicer = FleetServicer(
        Runtime(subject, publisher=NoEnvoys(), memory=SlowDisk()), proxy_id="p", report_interval_seconds=1.0
    )

    def say(worker_id: str) -> None:
        failed = types_pb2.RequestFinished(request_id="q", status_code=14)
        delta = types_pb2.LoadDelta(replica_id="r", finished=[failed] * 10)
        servicer.take(fleet_pb.SessionRequest(load=fleet_pb.LoadReport(deltas=[delta])), worker_id, 1.0)

    say("other")
    gone = types_pb2.Replica(replica_id="r", model="m", state=types_pb2.REPLICA_STATE_STOPPED)
    event = fleet_pb.ReplicaEvent(sequence=1, replica=gone)
    servicer.take(fleet_pb.SessionRequest(replica_event=event), "other", 1.0)
    assert subject.pick(entry("m"), "q1", 1.0) is not None
    say("w")
    assert subject.pick(entry("m"), "q2", 1.0) is None, "its own worker's word opens the circuit"
