"""``helios workers``: who runs replicas, and taking one out of service; ``helios scaling``: what was decided."""

import json
from collections.abc import Iterable
from datetime import UTC
from typing import Any, Final, Literal

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from helios.api.admin.v1 import admin_service_pb2 as pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory

_CALL_SECONDS: Final = 10.0
_PAGE_SIZE: Final = 1000
_GIB: Final = 1 << 30

Change = Literal["cordon", "uncordon", "drain"]


async def list_workers(state: StateDirectory, console: Console, *, is_json: bool) -> None:
    """Prints the workers that are connected."""
    workers: list[pb.Worker] = []
    async with open_admin(state) as dialer:
        page = pb.ListWorkersResponse(next_page_token="")
        while not workers or page.next_page_token:
            request = pb.ListWorkersRequest(page_size=_PAGE_SIZE, page_token=page.next_page_token)
            page = await dialer.stub(AdminServiceStub).ListWorkers(request, timeout=_CALL_SECONDS)
            workers += page.workers
            if not page.workers:
                break
    if is_json:
        console.print_json(json.dumps(_documents(workers)))
        return
    table = Table(box=None)
    for title in ("WORKER", "NODE", "DEVICES", "BOOKED", "REPLICAS", "ENGINES", "STATE"):
        table.add_column(title, overflow="fold")
    for worker in workers:
        booked = sum(device.booked_bytes for device in worker.devices)
        memory = sum(device.memory_bytes for device in worker.devices)
        table.add_row(
            worker.worker_id,
            worker.node,
            ", ".join(device.device_id for device in worker.devices),
            f"{booked / _GIB:.1f} of {memory / _GIB:.1f} GiB",
            f"{worker.replica_count} of {worker.slot_count}",
            ", ".join(worker.engines),
            "cordoned" if worker.cordoned else "open",
        )
    console.print(table)


async def change(state: StateDirectory, console: Console, worker_id: str, what: Change, *, is_dry_run: bool) -> None:
    """Cordons, uncordons or drains a worker. Raises NotFound."""
    would = "would be " if is_dry_run else ""
    async with open_admin(state) as dialer:
        stub = dialer.stub(AdminServiceStub)
        match what:
            case "cordon":
                cordon = pb.CordonWorkerRequest(worker_id=worker_id, dry_run=is_dry_run)
                kept = await stub.CordonWorker(cordon, timeout=_CALL_SECONDS)
                done = f"{would}cordoned; {kept.replica_count} replica(s) go on"
            case "uncordon":
                uncordon = pb.UncordonWorkerRequest(worker_id=worker_id, dry_run=is_dry_run)
                await stub.UncordonWorker(uncordon, timeout=_CALL_SECONDS)
                done = f"{would}open again"
            case _:
                drain = pb.DrainWorkerRequest(worker_id=worker_id, dry_run=is_dry_run)
                drained = await stub.DrainWorker(drain, timeout=_CALL_SECONDS)
                only = f"; nowhere else: {', '.join(drained.only_here)}" if drained.only_here else ""
                done = f"{would}cordoned; {drained.draining_count} replica(s) {would}draining{only}"
    console.print(f"{worker_id}: {done}", markup=False, soft_wrap=True)


async def scaling(state: StateDirectory, console: Console, model: str, *, count: int, is_json: bool) -> None:
    """Prints how many replicas models were to have, what asked for that, and why, the newest first."""
    async with open_admin(state) as dialer:
        request = pb.ListScalingDecisionsRequest(model=model, page_size=count)
        response = await dialer.stub(AdminServiceStub).ListScalingDecisions(request, timeout=_CALL_SECONDS)
    if is_json:
        console.print_json(json.dumps(_documents(response.decisions)))
        return
    if not response.decisions:
        console.print("nothing was decided of any model yet but to start it for its requests", style="dim")
        return
    table = Table(box=None)
    for title in ("TIME", "MODEL", "CAUSE", "REPLICAS", "REASON"):
        table.add_column(title, overflow="fold")
    for decision in response.decisions:
        at = decision.decided_at.ToDatetime(tzinfo=UTC).astimezone().strftime("%H:%M:%S")
        advice = " (advice only)" if decision.advice else ""
        asked = f"{decision.from_count} → {decision.to_count}{advice}"
        cause = pb.ScalingCause.Name(decision.cause).removeprefix("SCALING_CAUSE_").lower()
        table.add_row(at, decision.model, cause, asked, decision.reason)
    console.print(table)


def _documents(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [
        MessageToDict(each, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for each in messages
    ]
