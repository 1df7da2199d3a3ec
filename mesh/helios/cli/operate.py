"""What operators order of models and replicas, and watching what happens to them."""

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC
from typing import Final

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console

from helios.api.admin.v1 import admin_service_pb2 as pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from helios.api.fleet.v1 import fleet_service_pb2
from helios.cli.edge import open_admin
from helios.cli.options import NOTHING_DONE
from helios.cli.state import StateDirectory
from helios.mesh.errors import Unavailable
from helios.mesh.status import error_from_rpc

_CALL_SECONDS: Final = 10.0
# A proxy that restarts is back in a second or two.
_PAUSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Order:
    """Where orders go, and whether they are only asked about."""

    state: StateDirectory
    console: Console
    is_dry_run: bool = False

    def say(self, subject: str, done: str) -> None:
        """Prints what was done to whom, or what would be."""
        would = NOTHING_DONE if self.is_dry_run else ""
        self.console.print(f"{subject}: {would}{done}", markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class EventOptions:
    """What ``helios events`` shows.

    Attributes:
        model: only what happens to this model; empty: everything.
        is_following: go on with what comes.
        is_json: a line of JSON for each.
    """

    model: str
    is_following: bool
    is_json: bool


async def preload(order: Order, model: str) -> None:
    """Starts a replica of a model unless there is one."""
    async with open_admin(order.state) as dialer:
        request = pb.PreloadModelRequest(model=model, dry_run=order.is_dry_run)
        response = await dialer.stub(AdminServiceStub).PreloadModel(request, timeout=_CALL_SECONDS)
    if not order.is_dry_run:
        order.say(model, f"{len(response.replicas)} replica(s) ready or starting")
    elif response.worker_id:
        order.say(model, f"a replica would start on {response.worker_id}: {response.placement}")
    else:
        order.say(model, response.placement)


async def scale(order: Order, model: str, count: int) -> None:
    """Sets the number of replicas."""
    async with open_admin(order.state) as dialer:
        request = pb.ScaleModelRequest(model=model, replica_count=count, dry_run=order.is_dry_run)
        response = await dialer.stub(AdminServiceStub).ScaleModel(request, timeout=_CALL_SECONDS)
    order.say(model, f"{response.desired_count} asked for, {response.ready_count} ready")


async def evict(order: Order, model: str) -> None:
    """Stops a model's replicas and drops its bytes from the node."""
    async with open_admin(order.state) as dialer:
        request = pb.EvictModelRequest(model=model, dry_run=order.is_dry_run)
        response = await dialer.stub(AdminServiceStub).EvictModel(request, timeout=_CALL_SECONDS)
    order.say(model, f"{response.draining_count} replica(s) draining; the registry keeps the model")


async def stage(order: Order, model: str) -> None:
    """Keeps a model's weights in memory and stops its replicas."""
    async with open_admin(order.state) as dialer:
        request = pb.StageModelRequest(model=model, dry_run=order.is_dry_run)
        response = await dialer.stub(AdminServiceStub).StageModel(request, timeout=_CALL_SECONDS)
    is_done = response.state == fleet_service_pb2.STAGED_STATE_STAGED
    stands = "its weights are in memory" if is_done else "its weights are on their way to memory"
    order.say(model, f"{stands} on {response.worker_id}; {response.draining_count} replica(s) draining")


async def unstage(order: Order, model: str) -> None:
    """Gives a staged model's memory back."""
    async with open_admin(order.state) as dialer:
        request = pb.UnstageModelRequest(model=model, dry_run=order.is_dry_run)
        response = await dialer.stub(AdminServiceStub).UnstageModel(request, timeout=_CALL_SECONDS)
    order.say(model, f"memory given back on {response.worker_count} node(s)")


async def sleep_replica(order: Order, replica: str) -> None:
    """Puts a replica to sleep."""
    async with open_admin(order.state) as dialer:
        request = pb.SleepReplicaRequest(replica_id=replica, dry_run=order.is_dry_run)
        response = await dialer.stub(AdminServiceStub).SleepReplica(request, timeout=_CALL_SECONDS)
    order.say(f"{replica} of {response.replica.model}", "goes to sleep; a request wakes it")


async def wake_replica(order: Order, replica: str) -> None:
    """Wakes a replica."""
    async with open_admin(order.state) as dialer:
        request = pb.WakeReplicaRequest(replica_id=replica, dry_run=order.is_dry_run)
        response = await dialer.stub(AdminServiceStub).WakeReplica(request, timeout=_CALL_SECONDS)
    order.say(f"{replica} of {response.replica.model}", "wakes")


async def reset_breaker(order: Order, replica: str) -> None:
    """Has a replica picked again whatever it failed at."""
    async with open_admin(order.state) as dialer:
        request = pb.ResetBreakerRequest(replica_id=replica, dry_run=order.is_dry_run)
        response = await dialer.stub(AdminServiceStub).ResetBreaker(request, timeout=_CALL_SECONDS)
    was = pb.BreakerState.Name(response.before).removeprefix("BREAKER_STATE_").lower().replace("_", "-")
    order.say(replica, f"its breaker was {was}; it is picked")


async def events(state: StateDirectory, console: Console, options: EventOptions) -> None:
    """Prints what happened to workers and replicas, and goes on where asked, also over a restart of the proxy.

    Raises:
        Unavailable: there was nobody to begin with.
    """
    cursor = ""
    async with open_admin(state) as dialer:
        while True:
            request = pb.WatchEventsRequest(model=options.model, after=cursor, until_now=not options.is_following)
            # What follows comes for as long as somebody reads it.
            timeout = None if options.is_following else _CALL_SECONDS
            call = dialer.stub(AdminServiceStub).WatchEvents(request, timeout=timeout)
            try:
                async for response in call:
                    cursor = response.event.cursor or response.missed.cursor
                    line = _line(response, is_json=options.is_json)
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                return
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error)
                # Where nothing has come yet, there was nobody to begin with.
                if not (options.is_following and isinstance(failure, Unavailable) and cursor):
                    raise failure from error
            finally:
                call.cancel()
            await asyncio.sleep(_PAUSE_SECONDS)


def _line(response: pb.WatchEventsResponse, *, is_json: bool) -> str:
    if is_json:
        return json.dumps(MessageToDict(response, preserving_proto_field_name=True))
    if response.HasField("missed"):
        return "older events are not known any more"
    event = response.event
    at = event.at.ToDatetime(tzinfo=UTC).astimezone().strftime("%H:%M:%S")
    kind = pb.FleetEventKind.Name(event.kind).removeprefix("FLEET_EVENT_KIND_").lower().replace("_", "-")
    subject = " ".join(filter(None, (event.model, event.replica_id, event.worker_id and f"on {event.worker_id}")))
    why = ": ".join(filter(None, (event.reason.lower().replace("_", "-"), event.message)))
    return f"{at} {kind:<19} {subject}  {why}".rstrip()
