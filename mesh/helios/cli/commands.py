"""What each command does; ``helios.cli.main`` only parses."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any, Final

import psutil
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helios.api.admin.v1 import admin_service_pb2 as admin_pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from helios.api.catalog.v1 import model_service_pb2 as catalog_pb
from helios.api.catalog.v1.model_service_pb2_grpc import ModelServiceStub
from helios.api.engine.v1 import engine_settings_pb2 as engine_pb
from helios.api.fleet.v1 import fleet_service_pb2
from helios.api.fleet.v1 import types_pb2 as fleet_pb
from helios.cli import engine_settings
from helios.cli.boot import BootDisplay
from helios.cli.chat import Conversation
from helios.cli.children import child_environment, kill_leftovers
from helios.cli.edge import open_admin, open_edge
from helios.cli.greeting import greeting
from helios.cli.leaders import leader_line, leases_of
from helios.cli.log_files import read_lines, tail
from helios.cli.model_versions import versions_of
from helios.cli.models_follow import following_of
from helios.cli.models_profile import summary_of
from helios.cli.models_set import settings_of
from helios.cli.state import MeshRecord, StateDirectory, find_running, read_mesh
from helios.cli.topology import requires_keys
from helios.cli.topology import settings_of as settings_of_mesh
from helios.cli.transfer_progress import fetch_text, size
from helios.cli.up import Mesh, UpOptions, run_mesh
from helios.mesh.errors import DeadlineExceeded, InvalidRequest, PreconditionFailed, Unavailable
from helios.registry.client import Artifact, ArtifactClient, VersionClient

_CALL_SECONDS: Final = 15.0
_DETACHED_START_SECONDS: Final = 600.0
# For a mesh that does not say how long its stop may take.
_STOP_SECONDS: Final = 120.0
# A mesh whose stop hangs ends itself when its time is over: until that is seen here.
_LAST_SECONDS: Final = 2.0


async def up(options: UpOptions, console: Console) -> None:
    """Runs the mesh in the foreground until Ctrl-C."""
    with BootDisplay(console) as display:

        def on_ready(mesh: Mesh) -> None:
            display.close()
            _say(console, _greeting(options, mesh.edge, mesh.admin))
            console.print("Ctrl-C drains and stops.", style="dim")

        await run_mesh(options, display.show, on_ready)
    console.print("stopped", style="dim")


async def up_detached(options: UpOptions, console: Console) -> None:
    """Starts a foreground ``up`` in a session of its own and returns once it serves."""
    state = options.state
    state.create()
    running = read_mesh(state)
    if running is not None and running.is_alive:
        with state.lock():
            pass
    log_path = state.logs / "up.log"
    process = _spawn_up(options, log_path)
    with console.status("starting the mesh") as spinner:
        record = await _wait_serving(state, process, log_path, spinner.update)
    _say(console, _greeting(options, record.edge, record.admin))


def _greeting(options: UpOptions, edge: str, admin: str) -> str:
    needs_key = requires_keys(settings_of_mesh(options))
    return greeting(options.state, edge=edge, admin=admin, model=options.model or "MODEL", needs_key=needs_key)


def _spawn_up(options: UpOptions, log_path: Path) -> subprocess.Popen[bytes]:
    state = options.state
    arguments = [sys.executable, "-m", "helios.cli", "up", "--state-dir", str(state.root), "--host", options.host]
    arguments += ["--port", str(options.port), "--admin-port", str(options.admin_port), "--model", options.model]
    arguments += ["--proxies", str(options.proxies)]
    arguments += [f"--set={override}" for override in options.overrides]
    log_path.unlink(missing_ok=True)
    with log_path.open("ab") as log_file:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=child_environment({}),
            start_new_session=True,
        )


async def _wait_serving(
    state: StateDirectory, process: subprocess.Popen[bytes], log_path: Path, show: Callable[[str], None]
) -> MeshRecord:
    deadline = time.monotonic() + _DETACHED_START_SECONDS
    while time.monotonic() < deadline:
        record = read_mesh(state)
        if record is not None and record.pid == process.pid and record.state == "ready":
            return record
        if process.poll() is not None:
            end = tail(log_path, 15)
            raise Unavailable(f"the mesh did not start; {log_path} ends with:\n{end}", reason="START_FAILED")
        if record is not None and record.pid == process.pid:
            waiting = [child.name for child in record.processes if child.state != "ready"]
            show(f"starting the mesh: waiting for {', '.join(waiting) or 'the model'}")
        await asyncio.sleep(0.1)
    process.terminate()
    raise DeadlineExceeded(f"the mesh did not start in {_DETACHED_START_SECONDS:.0f} s; see {log_path}")


async def down(state: StateDirectory, console: Console, *, timeout_seconds: float | None) -> None:
    """Stops the mesh of a state directory and waits until it is gone; None waits for as long as it may take."""
    left = read_mesh(state)
    if timeout_seconds is None:
        longest = left.stop_seconds if left is not None else 0.0
        timeout_seconds = longest + _LAST_SECONDS if longest else _STOP_SECONDS
    if left is not None and not left.is_alive:
        ended = await asyncio.to_thread(kill_leftovers, left.processes, timeout_seconds=timeout_seconds)
        if ended:
            console.print(f"stopped {ended} process(es) that a killed mesh had left")
            return
    record = find_running(state)
    process = psutil.Process(record.pid)
    process.terminate()
    deadline = time.monotonic() + timeout_seconds
    with console.status("draining"):
        while record.is_alive:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"the mesh (pid {record.pid}) did not stop in {timeout_seconds:.0f} s; wait, or kill that process: "
                    "the next `helios up` cleans up"
                )
            await asyncio.sleep(0.1)
    console.print("stopped")


async def status(state: StateDirectory, console: Console, *, is_json: bool) -> None:
    """Shows what runs."""
    record = find_running(state)
    document: dict[str, Any] = {"mesh": asdict(record)}
    async with open_admin(state) as dialer:
        admin = dialer.stub(AdminServiceStub)
        workers = await admin.ListWorkers(admin_pb.ListWorkersRequest(page_size=1000), timeout=_CALL_SECONDS)
        replicas = await admin.ListReplicas(admin_pb.ListReplicasRequest(page_size=1000), timeout=_CALL_SECONDS)
        catalog = dialer.stub(ModelServiceStub)
        models = await catalog.ListModels(catalog_pb.ListModelsRequest(), timeout=_CALL_SECONDS)
        leases = await leases_of(dialer)
    if is_json:
        document["leases"] = [asdict(lease) for lease in leases]
        document |= {"workers": _plain(workers)["workers"], "replicas": _plain(replicas)["replicas"]}
        document["failures"] = _plain(replicas)["failures"]
        console.print_json(json.dumps(document | {"models": _plain(models)["data"]}))
        return
    console.print(f"mesh [bold]{record.state}[/]  edge http://{record.edge}/v1  admin {record.admin}  {state.root}")
    console.print(_process_table(record))
    if leader := leader_line(leases):
        console.print(leader, highlight=False)
    console.print(_worker_table(workers))
    console.print(model_table(models.data))
    if replicas.replicas:
        console.print(replica_table(replicas))
    for failed in replicas.failures:
        console.print(_failure(failed), highlight=False)


async def models_list(state: StateDirectory, console: Console, *, is_json: bool) -> None:
    """Lists the models."""
    async with open_admin(state) as dialer:
        stub = dialer.stub(ModelServiceStub)
        response = await stub.ListModels(catalog_pb.ListModelsRequest(), timeout=_CALL_SECONDS)
    if is_json:
        console.print_json(json.dumps(_plain(response)["data"]))
    else:
        console.print(model_table(response.data))


async def models_show(state: StateDirectory, console: Console, name: str, *, is_json: bool) -> None:
    """Shows one model."""
    async with open_admin(state) as dialer:
        stub = dialer.stub(ModelServiceStub)
        response = await stub.GetModel(catalog_pb.GetModelRequest(model=name), timeout=_CALL_SECONDS)
        found = await VersionClient(dialer).resolve(name)
        artifacts = await ArtifactClient(dialer).list_artifacts(revision=found.revision.digest)
        following = await following_of(dialer, found.model.name)
        profile = await summary_of(dialer, name)
    settings = engine_settings.flatten(settings_of(found.model))
    fields = _plain(response) | {"engine_settings": settings, "versions": versions_of(found.model)}
    fields["artifacts"] = list(map(_artifact, artifacts))
    fields["following"] = following
    fields["profile"] = profile
    if is_json:
        console.print_json(json.dumps(fields))
        return
    table = Table(show_header=False, box=None)
    for key, value in fields.items():
        table.add_row(key, Text(json.dumps(value) if isinstance(value, dict | list) else str(value)))
    console.print(table)


def _artifact(artifact: Artifact) -> dict[str, object]:
    """What people want to know of an artifact: what it is for, from whom, how large, and whether it is used."""
    return {
        "kind": artifact.kind,
        "key": artifact.key,
        "size_bytes": artifact.size_bytes,
        "producer": artifact.producer,
        "created_at": artifact.created_at.isoformat(timespec="seconds"),
        "used_at": artifact.used_at.isoformat(timespec="seconds"),
        "inputs": json.loads(artifact.inputs),
    }


@dataclass(frozen=True, slots=True)
class Turns:
    """How ``helios chat`` talks."""

    message: str
    """Ask this and leave; empty: ask the terminal."""
    max_tokens: int | None
    temperature: float | None
    api_key: str = field(default="", repr=False)


async def chat(state: StateDirectory, console: Console, model: str, turns: Turns) -> None:
    """Talks to a model, one turn or until the input ends."""
    record = find_running(state)
    chosen = model or record.model
    if not chosen:
        raise PreconditionFailed("name a model: helios chat MODEL; `helios models list` shows them")

    def write(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    async with open_edge(record, turns.api_key) as dialer:
        conversation = Conversation(dialer, chosen, max_tokens=turns.max_tokens, temperature=turns.temperature)
        if turns.message:
            await conversation.ask(turns.message, write)
            console.print()
            return
        console.print(f"{chosen}; an empty line or Ctrl-D ends", style="dim")
        while text := await asyncio.to_thread(_read_line):
            usage = await conversation.ask(text, write)
            console.print(f"\n[dim]{usage.prompt_tokens} + {usage.completion_tokens} tokens[/]")


async def logs(state: StateDirectory, console: Console, process: str, *, is_following: bool, line_count: int) -> None:
    """Prints the ends of logs, and goes on with new lines where asked."""
    paths = sorted(state.logs.glob("*.log"))
    chosen = [path for path in paths if not process or path.stem == process]
    if not chosen:
        names = ", ".join(path.stem for path in paths) or "none yet"
        raise InvalidRequest(f"no log named {process or '(any)'} in {state.logs}; there is: {names}")
    positions = {}
    for path in chosen:
        positions[path] = path.stat().st_size
        for line in tail(path, line_count).splitlines() if line_count else ():
            _print_line(console, path, line, is_named=len(chosen) > 1)
    while is_following:
        for path in chosen:
            lines, positions[path] = read_lines(path, positions[path])
            for line in lines:
                _print_line(console, path, line, is_named=len(chosen) > 1)
        await asyncio.sleep(0.2)


def _say(console: Console, text: str) -> None:
    """Prints text as it is: rich would fold lines that are meant to be pasted."""
    console.file.write(text)
    console.file.flush()


def _print_line(console: Console, path: Path, line: str, *, is_named: bool) -> None:
    console.print(f"{path.stem}: {line}" if is_named else line, markup=False, highlight=False, soft_wrap=True)


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _table(*columns: str) -> Table:
    """A table whose cells are never cut: names are there to be copied."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("process", "worker", "model", "replica"))
    return table


def _process_table(record: MeshRecord) -> Table:
    table = _table("process", "state", "pid", "restarts", "metrics", "last exit")
    for child in record.processes:
        metrics = f"http://{child.ops_address}/metrics" if child.ops_address else ""
        table.add_row(child.name, child.state, str(child.pid), str(child.restart_count), metrics, child.detail)
    return table


def _worker_table(response: admin_pb.ListWorkersResponse) -> Table:
    table = _table("worker", "node", "slots", "device", "booked", "memory", "in use", "state")
    for worker in response.workers:
        for device in worker.devices:
            slots = f"{worker.replica_count}/{worker.slot_count}"
            booked, memory = size(device.booked_bytes), size(device.memory_bytes)
            name = f"{device.device_id} {device.mig_profile or device.name}".strip()
            table.add_row(worker.worker_id, worker.node, slots, name, booked, memory, *_telemetry(device))
        if worker.host_memory.memory_bytes:
            host = worker.host_memory
            sizes = size(host.booked_bytes), size(host.memory_bytes)
            table.add_row(worker.worker_id, worker.node, "", f"staged: {len(worker.staged)}", *sizes, "", "")
    return table


def _telemetry(device: fleet_service_pb2.Device) -> tuple[str, str]:
    """What was measured of a device; empty where it can't say."""
    measured = device.telemetry
    health = fleet_service_pb2.DeviceHealth.Name(device.health).removeprefix("DEVICE_HEALTH_").lower()
    state = (
        f"{measured.utilization_ratio:.0%}" if measured.HasField("utilization_ratio") else "",
        f"{measured.temperature_celsius} °C" if measured.HasField("temperature_celsius") else "",
        f"{measured.uncorrected_error_count} errors" if measured.uncorrected_error_count else "",
        "" if health == "unspecified" else f"{health} {device.health_message}",
    )
    return size(measured.used_bytes) if measured.HasField("used_bytes") else "", " ".join(filter(None, state)).strip()


def model_table(models: Any) -> Table:
    """Models, a line each."""
    table = _table("model", "state", "ready", "starting", "asleep", "staged", "weights", "memory", "context", "aliases")
    for model in models:
        name = catalog_pb.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower()
        if model.HasField("fetch"):
            fetch = model.fetch
            left = fetch.remaining_seconds if fetch.HasField("remaining_seconds") else None
            name = f"{name}, {fetch_text(fetch.done_bytes, fetch.total_bytes, fetch.bytes_per_second, left)}"
        sizes = size(model.resources.weights_bytes), size(model.resources.memory_bytes)
        replicas = model.replicas
        counts = (str(n) for n in (replicas.ready, replicas.starting, replicas.asleep, replicas.staged))
        table.add_row(model.id, name, *counts, *sizes, str(model.max_context_tokens), ", ".join(model.aliases))
    return table


def _failure(failed: admin_pb.FailedReplica) -> Text:
    replica, at = failed.replica, failed.failed_at.ToDatetime(tzinfo=UTC).astimezone()
    text = Text(f"{at:%H:%M:%S} {replica.model}: replica {replica.replica_id} failed: ", "red")
    return text.append(f"{replica.failure.reason}: {replica.failure.message}", "default")


def replica_table(response: admin_pb.ListReplicasResponse) -> Table:
    """Replicas, a line each."""
    table = _table("replica", "model", "state", "worker", "address", "running", "booked", "measured", "start")
    for entry in response.replicas:
        replica = entry.replica
        name = fleet_pb.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
        if replica.compilation:
            form = engine_pb.CompilationMode.Name(replica.compilation).removeprefix("COMPILATION_MODE_").lower()
            name = f"{name}, {form}"
        if replica.HasField("fetch"):
            fetch = replica.fetch
            left = fetch.remaining.ToNanoseconds() / 1e9 if fetch.HasField("remaining") else None
            name = f"{name}, {fetch_text(fetch.done_bytes, fetch.total_bytes, fetch.bytes_per_second, left)}"
        seconds = sum(phase.duration.ToMilliseconds() for phase in replica.phases) / 1000
        running = str(replica.load.running_requests)
        sizes = size(replica.memory_bytes), size(replica.measured_bytes) if replica.measured_bytes else ""
        where = entry.worker_id, replica.address
        table.add_row(replica.replica_id, replica.model, name, *where, running, *sizes, f"{seconds:.1f} s")
    return table
