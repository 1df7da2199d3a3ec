"""Composition root of the worker: ``python -m helios.worker``.

Start: subreaper → launcher and storage client → take over what a predecessor left → the socket for replicas → wait for
those that are known → sessions with the proxies. Stop: cordon → drain the replicas (or leave them) → close.
"""

import asyncio
import fcntl
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final

import structlog

from helios.api.worker.v1 import supervisor_service_pb2
from helios.api.worker.v1.supervisor_service_pb2_grpc import add_SupervisorServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.errors import InvalidRequest, PreconditionFailed
from helios.mesh.process import Lifetime, run
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.tasks import task_scope
from helios.registry.client import ArtifactClient
from helios.storage.client import StorageClient
from helios.worker.artifacts.door import ArtifactDoor
from helios.worker.artifacts.keeper import ArtifactKeeper, Shelf
from helios.worker.artifacts.packed_shelf import PackedShelf
from helios.worker.artifacts.requests import COMPILE_CACHE, PACKED_WEIGHTS
from helios.worker.artifacts.shelf import CompileShelf
from helios.worker.devices.inventory import Inventory, open_inventory
from helios.worker.early.loads import EarlyLoads
from helios.worker.launcher.launchers import Launchers
from helios.worker.replica.artifact_directory import drop_unused
from helios.worker.replica.engines import installed_engines, split_engine
from helios.worker.replica.packed_weights import end_trials
from helios.worker.replica.spec import Placement, ReplicaSpec
from helios.worker.replica_logs import drop_surplus, log_path
from helios.worker.settings import SOCKET_PATH_LIMIT, WorkerSettings
from helios.worker.supervisor.attach_servicer import AttachServicer
from helios.worker.supervisor.core_placement import place
from helios.worker.supervisor.epoch_file import EpochFile
from helios.worker.supervisor.fence import Fence
from helios.worker.supervisor.fleet_session import FleetSession
from helios.worker.supervisor.front_placement import FrontPlacement, bind_process
from helios.worker.supervisor.gauges import keep_measuring
from helios.worker.supervisor.host import pick_free_port, staging_memory_bytes
from helios.worker.supervisor.ledger import Booking, Ledger
from helios.worker.supervisor.life_stages import Limits
from helios.worker.supervisor.orders import Rules
from helios.worker.supervisor.process_tree import become_subreaper, boot_id
from helios.worker.supervisor.proxy_sessions import ProxySessions
from helios.worker.supervisor.records import ReplicaView
from helios.worker.supervisor.replica_list import ReplicaList
from helios.worker.supervisor.supervisor import Supervisor

log = structlog.get_logger()

_SERVICE: Final = supervisor_service_pb2.DESCRIPTOR.services_by_name["SupervisorService"].full_name
# Attach streams never end by themselves; whoever holds one dials again.
_CLOSE_SECONDS: Final = 0.2
# Old logs and compiled code may pile up for this long: ten minutes of failing starts are some hundred small files.
# Looking at a full cache of compiled code takes up to a second.
_TIDY_SECONDS: Final = 600.0


async def main(settings: WorkerSettings, lifetime: Lifetime) -> None:
    """Supervises until the process is asked to stop."""
    become_subreaper()
    _prepare(settings)
    identity = settings.mesh.identity
    async with AsyncExitStack() as stack:
        stack.enter_context(_only_one(settings.state_directory))
        storage = await stack.enter_async_context(Dialer(settings.storage_target, identity=identity, peer="storage"))
        weights = StorageClient(storage, sealed_directory=settings.state_directory / "sealed")
        launchers = await stack.enter_async_context(
            Launchers(
                log_level=settings.log_level,
                search_path=(str(settings.class_path),),
                pool_size=settings.launcher.pool_size,
                lasting=frozenset({split_engine(settings.replica.engine)[0]}),
                idle_seconds=settings.launcher.idle_seconds,
            )
        )
        device = settings.device
        inventory = open_inventory(memory_bytes=device.memory_bytes, gpu_memory_ratio=device.gpu_memory_ratio)
        stack.callback(inventory.close)
        group = await stack.enter_async_context(task_scope())
        ledger = _ledger(settings, inventory)
        supervisor = Supervisor(
            _rules(settings),
            group=group,
            ledger=ledger,
            launcher=launchers,
            weights=weights,
            replica_list=ReplicaList(settings.state_directory / "replicas.json", boot_id()),
            make_spec=_SpecMaker(settings, inventory),
            host_memory_bytes=staging_memory_bytes(settings.device.staging_bytes),
        )
        supervisor.early = await _open_early_loads(settings, stack, weights)
        keeper = await _share_artifacts(settings, group, stack, weights)
        supervisor.on_ended = _note_ends(settings, keeper)
        _place_fronts(settings, supervisor, ledger)
        awaited_count = supervisor.recover()
        measuring = keep_measuring(inventory, supervisor, interval_seconds=settings.device.telemetry_seconds)
        group.create_task(measuring, name="measure devices")
        group.create_task(_take_exits(launchers, supervisor), name="take exits")
        server = MeshServer(
            listen=settings.socket_target,
            identity=identity,
            policy={_SERVICE: frozenset({"worker"})},
            options=ServerOptions(drain_seconds=_CLOSE_SECONDS, transport="http2"),
        )
        servicer = AttachServicer(
            supervisor,
            group=group,
            report_interval_seconds=settings.replica.report_interval_seconds,
            orphan_seconds=settings.replica.orphan_seconds,
        )
        add_SupervisorServiceServicer_to_server(servicer, server.grpc)
        server.serve(_SERVICE)
        await stack.enter_async_context(server)
        if not await supervisor.wait_returned(settings.resync_seconds):
            log.warning(
                "replicas are not back yet", awaited_count=awaited_count, waited_seconds=settings.resync_seconds
            )
        if supervisor.early is not None:
            supervisor.early.sweep(supervisor.replica_ids())
        group.create_task(_proxy_sessions(settings, supervisor).run(), name="fleet sessions")
        group.create_task(_keep_files_bounded(settings, supervisor), name="keep files bounded")
        engine, _ = split_engine(settings.replica.engine)
        facts = {"supervisor_address": server.address, "on_stop": settings.on_stop}
        group.create_task(_say_ready(launchers, engine, lifetime, facts), name="say ready")
        await lifetime.wait_stop()
        await _stop(supervisor, settings)


def _proxy_sessions(settings: WorkerSettings, supervisor: Supervisor) -> ProxySessions:
    epochs = EpochFile(settings.state_directory / "epoch")
    fence = Fence(epochs.read(), epochs.write)

    def open_session(address: str) -> FleetSession:
        return FleetSession(
            address, identity=settings.mesh.identity, feed=supervisor.feed, executor=supervisor, fence=fence
        )

    return ProxySessions(settings.proxies, open_session, resolve_seconds=settings.proxies_resolve_seconds)


def _place_fronts(settings: WorkerSettings, supervisor: Supervisor, ledger: Ledger) -> None:
    """Has every change of a replica tell all fronts where they may run."""
    fronts = FrontPlacement(settings.usable_cores, bind_process)

    def update() -> None:
        replicas = supervisor.view().replicas
        slots = {booking.replica_id: booking.slot for booking in ledger.bookings}
        engines = {view.replica_id: _place(settings, slots[view.replica_id], view).engine_cores for view in replicas}
        fronts.update(replicas, engines)

    supervisor.on_changed = update


def _place(settings: WorkerSettings, slot: int, view: ReplicaView) -> Placement:
    return place(
        slot,
        settings.usable_cores,
        engine_core_count=settings.device.engine_core_count,
        rank_count=view.order.settings.rank_count,
    )


async def _open_early_loads(
    settings: WorkerSettings, stack: AsyncExitStack, storage: StorageClient
) -> EarlyLoads | None:
    """Opens the door where loads ask what is here, where they may begin before all is; else returns None."""
    door = settings.early_door
    if door is None:
        if settings.replica.early_load:
            log.warning("replicas load when all is here: the path of their socket would be too long")
        return None
    return await stack.enter_async_context(EarlyLoads(settings.early_directory, door, storage))


async def _share_artifacts(
    settings: WorkerSettings, group: asyncio.TaskGroup, stack: AsyncExitStack, weights: StorageClient
) -> ArtifactKeeper | None:
    """Opens the door where replicas ask for artifacts, where there is a registry that keeps them; else returns None."""
    door = settings.artifact_door
    if door is None:
        if settings.registry_target:
            log.warning("artifacts are not shared: the path of their socket would be too long")
        return None
    compiled = CompileShelf(settings.compile_cache_directory)
    await asyncio.to_thread(compiled.sweep)
    shelves: dict[str, Shelf] = {COMPILE_CACHE: compiled}
    if settings.packed_weights_bytes:
        shelves[PACKED_WEIGHTS] = PackedShelf(
            settings.packed_weights_directory, offered_bytes=settings.published_weights_bytes
        )
    await asyncio.to_thread(shutil.rmtree, settings.artifact_scratch, ignore_errors=True)
    settings.artifact_scratch.mkdir()
    registry = Dialer(settings.registry_target, identity=settings.mesh.identity, peer="registry")
    keeper = ArtifactKeeper(
        settings.artifacts,
        group=group,
        registry=ArtifactClient(await stack.enter_async_context(registry)),
        lender=weights,
        shelves=shelves,
        producer=settings.worker_id,
        scratch=settings.artifact_scratch,
    )
    await stack.enter_async_context(ArtifactDoor(door, keeper))
    return keeper


def _note_ends(settings: WorkerSettings, keeper: ArtifactKeeper | None) -> Callable[[ReplicaView], None]:
    """Has the end of a replica count against the artifacts that it used, or not."""

    def note_end(view: ReplicaView) -> None:
        if keeper is not None:
            keeper.note_end(view.replica_id, is_failure=view.failure is not None)
        if view.failure is None:
            # One that is stopped while it starts is killed, and looks as if it had died of what it mapped. This looks
            # into a hundred directories at most: a fraction of a millisecond.
            end_trials(settings.packed_weights_directory, view.replica_id)

    return note_end


async def _say_ready(launchers: Launchers, engine: str, lifetime: Lifetime, facts: dict[str, str]) -> None:
    """Replicas that outlived the last worker serve at once; readiness means that new ones start in seconds too.

    Of the default engine, that is: launchers of the others are started when somebody wants one.
    """
    await launchers.wait_ready(engine)
    lifetime.mark_ready(**facts)


async def _stop(supervisor: Supervisor, settings: WorkerSettings) -> None:
    supervisor.cordon()
    if settings.on_stop == "leave":
        await supervisor.end_unlent()
    else:
        await supervisor.end_all(settings.replica.drain_seconds)
    supervisor.write_list()


async def _keep_files_bounded(settings: WorkerSettings, supervisor: Supervisor) -> None:
    while True:
        try:
            await asyncio.to_thread(drop_surplus, settings.replica_log_directory, supervisor.replica_ids())
            await asyncio.to_thread(drop_unused, settings.compile_cache_directory)
            await asyncio.to_thread(
                drop_unused, settings.packed_weights_directory, kept_bytes=settings.packed_weights_bytes
            )
        except OSError as error:
            log.warning("old files can't be removed", error=str(error))
        await asyncio.sleep(_TIDY_SECONDS)


async def _take_exits(launchers: Launchers, supervisor: Supervisor) -> None:
    while True:
        ended = await launchers.exits.get()
        supervisor.note_exit(ended.pid, ended.start_ticks, ended.status)


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Keeps a second supervisor off the same replicas; the kernel drops the lock with the process, however it ends.

    Raises:
        PreconditionFailed: STATE_IN_USE.
    """
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreconditionFailed(
                f"another worker runs on {directory}; stop it, or choose another state_directory", reason="STATE_IN_USE"
            ) from error
        yield


def _prepare(settings: WorkerSettings) -> None:
    """Makes the directories, and room for the socket. Raises InvalidRequest where the socket's path is too long."""
    settings.state_directory.mkdir(parents=True, exist_ok=True)
    settings.replica_log_directory.mkdir(parents=True, exist_ok=True)
    scheme, _, path = settings.socket_target.partition(":")
    if scheme != "unix" or len(path.encode()) > SOCKET_PATH_LIMIT:
        raise InvalidRequest(
            f"supervisor_listen must be unix:/path with a path of at most {SOCKET_PATH_LIMIT} bytes",
            metadata={"supervisor_listen": settings.socket_target},
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _rules(settings: WorkerSettings) -> Rules:
    replica = settings.replica
    return Rules(
        worker_id=settings.worker_id,
        incarnation=uuid.uuid4().hex,
        node=settings.node,
        zone=settings.zone,
        version=_version(),
        engines=_engines(settings),
        default_engine=replica.engine,
        replica_memory_bytes=replica.memory_bytes,
        kv_cache_bytes=replica.kv_cache_bytes,
        drain_seconds=replica.drain_seconds,
        return_seconds=settings.return_seconds,
        lease_ttl_seconds=replica.lease_ttl_seconds,
        limits=Limits(
            fetch_seconds=replica.fetch_seconds,
            start_seconds=replica.start_seconds,
            drain_seconds=replica.drain_seconds,
            drain_grace_seconds=replica.drain_grace_seconds,
            sleep_seconds=replica.sleep_seconds,
            wake_seconds=replica.wake_seconds,
            silence_seconds=replica.silence_seconds,
            background_start_seconds=replica.background_start_seconds,
            least_bytes_per_second=replica.least_bytes_per_second,
        ),
        sleep_left_bytes=replica.sleep_left_bytes,
        sleep_cycle_limit=replica.sleep_cycle_limit,
        packed_weights_directory=_packed_weights_directory(settings),
    )


def _packed_weights_directory(settings: WorkerSettings) -> str:
    return str(settings.packed_weights_directory) if settings.packed_weights_bytes else ""


def _engines(settings: WorkerSettings) -> tuple[str, ...]:
    """Returns what can run here, the default first.

    Raises:
        InvalidRequest: The default can't.
    """
    default, _ = split_engine(settings.replica.engine)
    installed = installed_engines()
    if default not in installed:
        raise InvalidRequest(
            f"replica.engine: {default!r} is not to be had here; there are: {', '.join(installed)}",
            metadata={"replica.engine": default},
        )
    return (default, *(engine for engine in installed if engine != default))


def _ledger(settings: WorkerSettings, inventory: Inventory) -> Ledger:
    return Ledger(
        inventory.devices(),
        slot_count=settings.slot_count,
        base_port=settings.base_port,
        pick_port=lambda taken: pick_free_port(settings.listen_host, taken),
    )


class _SpecMaker:
    """Turns a replica into the launcher's order."""

    def __init__(self, settings: WorkerSettings, inventory: Inventory) -> None:
        self._settings = settings
        self._uuids = {device.device_id: device.facts.uuid for device in inventory.devices()}

    def __call__(self, view: ReplicaView, booking: Booking, *, model_path: str, traceparent: str) -> ReplicaSpec:
        settings, order = self._settings, view.order
        identity = settings.mesh.identity
        return ReplicaSpec(
            replica_id=order.replica_id,
            model=order.model,
            revision=order.revision,
            model_path=model_path,
            engine=order.engine,
            options=order.options,
            settings=order.settings,
            served_names=order.served_names,
            kv_cache_bytes=order.kv_cache_bytes,
            max_context_tokens=order.max_context_tokens,
            memory_bytes=order.memory_bytes,
            lease_id=view.lease_id,
            device_ids=booking.device_ids,
            device_uuids=tuple(uuid for name in booking.device_ids if (uuid := self._uuids.get(name, ""))),
            memory_items={item.kind.value: item.size_bytes for item in booking.items},
            host_memory_items={item.kind.value: item.size_bytes for item in order.host_memory_items},
            host=settings.listen_host,
            port=booking.port,
            supervisor_address=settings.socket_target,
            identity_directory=str(identity.directory.absolute()) if identity else "",
            log_path=str(log_path(settings.replica_log_directory, order.model, order.replica_id)),
            compile_cache_directory=str(settings.compile_cache_directory),
            packed_weights_directory=_packed_weights_directory(settings),
            packed_weights_bytes=settings.packed_weights_bytes,
            artifact_door=str(settings.artifact_door or ""),
            artifact_seconds=settings.artifacts.take_seconds,
            kv_directory=str((settings.state_directory / "kv").absolute()),
            created_at=order.created_at,
            placement=_place(settings, booking.slot, view),
            is_background=order.is_background,
            drain_seconds=settings.replica.drain_seconds,
            orphan_seconds=settings.replica.orphan_seconds,
            stall_seconds=settings.replica.stall_seconds,
            traceparent=traceparent,
            otlp_endpoint=settings.otlp_endpoint,
            log_level=settings.log_level,
        )


def _version() -> str:
    try:
        return metadata.version("helios-llm")
    except metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    run("worker", WorkerSettings, main)
