"""Running a whole mesh on one machine: every process of it, from certificates to the first model, until it is told to
stop.
"""

import asyncio
import errno
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Final

import structlog

from helios.cli import topology
from helios.cli.certificates import issue_due, renew_forever
from helios.cli.children import (
    Child,
    become_subreaper,
    kill_leftovers,
    kill_orphans,
    reap_orphans,
    wait_all_ready,
)
from helios.cli.edge import open_admin
from helios.cli.log_files import rotate_forever
from helios.cli.state import MeshRecord, StateDirectory, process_started_at, read_mesh, write_mesh
from helios.mesh.errors import AlreadyExists, HeliosError, InvalidRequest, ModelNotFound, PreconditionFailed
from helios.mesh.last_words import end_within
from helios.mesh.tasks import keep_running, task_scope
from helios.registry.client import IngestProgress, KeyClient, RegistryClient

log = structlog.get_logger()

# The launcher alone imports vLLM for 10 s on a quiet machine; a busy one takes several times as long.
START_TIMEOUT_SECONDS: Final = 180.0
# What a stop gives to requests; what is left then is cut off.
DRAIN_SECONDS: Final = 20.0
# The order of the traffic: no new requests, then what serves them, then what they need.
STOP_ORDER: Final = (("envoy",), ("worker", "relay"), ("proxy",), ("storage", "registry"))
# For what is not waited for step by step: orphans, the kernel's own work after a SIGKILL, the end of this process.
_STOP_GRACE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What ``helios up`` was asked for."""

    state: StateDirectory
    host: str = "127.0.0.1"
    port: int = 8080
    admin_port: int = 8081
    model: str = topology.EMBEDDED_MODEL
    """Model to have ready at the end of the start; the embedded one is ingested on first use. Empty: none."""
    proxies: int = 1
    """How many proxies; of several, all pick and one leads."""
    overrides: tuple[str, ...] = ()
    """``component.field=value``: settings of the processes."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A step of the start, for whoever shows it."""

    step: str
    state: str
    """``running``, ``done`` or ``failed``."""
    detail: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


Report = Callable[[Progress], None]


class Mesh:
    """All processes of one mesh."""

    def __init__(self, options: UpOptions, report: Report) -> None:
        self._options = options
        self._report = report
        self._state = "starting"
        self._failure = ""
        self._started_at = process_started_at(os.getpid()) or 0.0
        settings = topology.settings_of(options)
        self._requires_keys = topology.requires_keys(settings)
        specs = topology.children(options.state, settings, options)
        self.children = [Child(spec, self._publish) for spec in specs]

    @property
    def stop_seconds(self) -> float:
        """How long stopping takes at most: each step its own limit, after which what still runs is killed, this process
        last (`end_within`).
        """
        limits = {topology.component_of(child.spec.name): child.spec.stop_seconds for child in self.children}
        steps = sum(max(limits[name] for name in names) for names in STOP_ORDER)
        return DRAIN_SECONDS + steps + _STOP_GRACE_SECONDS

    def children_of(self, components: Sequence[str]) -> list[Child]:
        """Returns the processes of components, of which there may be several each."""
        return [child for child in self.children if topology.component_of(child.spec.name) in components]

    @property
    def requires_keys(self) -> bool:
        """Whether requests need an API key."""
        return self._requires_keys

    @property
    def edge(self) -> str:
        """``host:port`` of the public address."""
        return f"{self._options.host}:{self._options.port}"

    @property
    def admin(self) -> str:
        """``host:port`` of the admin address."""
        return f"127.0.0.1:{self._options.admin_port}"

    async def run(
        self,
        stop: asyncio.Event,
        on_ready: Callable[[], None],
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts everything, calls ``on_ready``, serves until ``stop`` is set, calls ``on_stop``, drains.

        Raises HeliosError.
        """
        state = self._options.state
        # What a full disk stops goes on when there is room again; the processes run meanwhile.
        chores: dict[str, Callable[[], Awaitable[None]]] = {
            "renew certificates": lambda: renew_forever(state),
            "rotate logs": lambda: rotate_forever(state.logs),
            "reap orphans": lambda: reap_orphans(self._own_pids),
        }
        async with task_scope() as group:
            for name, chore in chores.items():
                group.create_task(keep_running(name, chore), name=name)
            for child in self.children:
                group.create_task(child.run(), name=f"run {child.spec.name}")
            try:
                if await _unless_stopped(self._start(), stop):
                    self._set("ready")
                    on_ready()
                    await stop.wait()
            except HeliosError as error:
                self._failure = error.message
                raise
            finally:
                on_stop()
                self._set("stopping")
                await self._stop(time.monotonic() + self.stop_seconds - _STOP_GRACE_SECONDS)
                self._set("failed" if self._failure else "stopped")

    async def _start(self) -> None:
        self._report(Progress("processes", "running", ", ".join(child.spec.name for child in self.children)))
        began = time.monotonic()
        light = [child for child in self.children if child.spec.name != "worker"]
        await wait_all_ready(light, timeout_seconds=START_TIMEOUT_SECONDS)
        for child in light:
            self._report(Progress(child.spec.name, "done", f"pid {child.pid}"))
        if self._requires_keys:
            await self._check_keys()
        if self._options.model:
            await self._ensure_model()
        await wait_all_ready(self.children, timeout_seconds=START_TIMEOUT_SECONDS)
        self._report(Progress("worker", "done", f"pid {next(c.pid for c in self.children if c.spec.name == 'worker')}"))
        self._report(Progress("processes", "done", f"{time.monotonic() - began:.1f} s"))

    async def _check_keys(self) -> None:
        """Refuses to serve where every request would be refused. Raises PreconditionFailed (NO_API_KEYS)."""
        async with open_admin(self._options.state) as dialer:
            keys = await KeyClient(dialer).list()
        if not keys:
            raise PreconditionFailed(
                f"on {self.edge} requests need an API key, and there is none: run `helios up` on a loopback address, "
                "`helios keys create NAME`, and start again; or, where something before Helios checks who asks, "
                "add --set proxy.admission.require_keys=false",
                reason="NO_API_KEYS",
            )
        self._report(Progress("keys", "done", f"{len(keys)}; requests need one"))

    async def _ensure_model(self) -> None:
        """Makes sure that the registry knows the model; the embedded one is ingested, any other must be there."""
        name = self._options.model
        async with open_admin(self._options.state) as dialer:
            registry = RegistryClient(dialer)
            try:
                await registry.get_model(name)
                self._report(Progress("model", "done", f"{name} is there"))
                return
            except ModelNotFound:
                self._report(Progress("model", "running", f"{name} is new"))
            source = topology.EMBEDDED_SOURCES.get(name)
            if source is None:
                raise ModelNotFound(
                    f"the registry has no model {name}; start without --model, then add it with "
                    f"`helios models add {name} PATH`"
                )
            aliases = topology.EMBEDDED_ALIASES.get(name, ())
            async for event in registry.ingest(name, source, aliases=aliases):
                if isinstance(event, IngestProgress):
                    self._report(Progress("model", "running", event.phase, event.done_bytes, event.total_bytes))
        self._report(Progress("model", "done", f"{name} ingested"))

    async def _stop(self, deadline: float) -> None:
        """Stops everything by a deadline (``time.monotonic()``); what still runs then is killed."""
        try:
            await topology.drain_envoy(self._options.state, min(time.monotonic() + DRAIN_SECONDS, deadline))
        finally:
            # Whatever Envoy answered, no process may be left behind.
            for names in STOP_ORDER:
                async with asyncio.TaskGroup() as group:
                    for child in self.children_of(names):
                        group.create_task(child.stop(deadline), name=f"stop {child.spec.name}")
        # A worker that says so leaves its replicas to its successor, for an upgrade.
        worker = next(child for child in self.children if child.spec.name == "worker")
        if worker.facts.get("on_stop") != "leave":
            orphans_by = deadline + _STOP_GRACE_SECONDS / 2
            killed = await asyncio.to_thread(kill_orphans, self._own_pids(), orphans_by)
            if killed:
                log.warning("processes that the mesh had left were killed", pids=killed)

    def _own_pids(self) -> set[int]:
        return {child.pid for child in self.children if child.pid}

    def _set(self, state: str) -> None:
        self._state = state
        self._publish()

    def _publish(self) -> None:
        record = MeshRecord(
            pid=os.getpid(),
            started_at=self._started_at,
            state=self._state,
            edge=self.edge,
            admin=self.admin,
            model=self._options.model,
            failure=self._failure,
            processes=tuple(child.record for child in self.children),
            stop_seconds=self.stop_seconds,
        )
        try:
            write_mesh(self._options.state, record)
        except OSError as error:
            # The processes matter more than the file about them, above all when they are to be stopped.
            log.warning("mesh.json can't be written", error=str(error))


async def run_mesh(options: UpOptions, report: Report, on_ready: Callable[[Mesh], None]) -> None:
    """Runs a mesh in this process until SIGINT, SIGTERM or SIGHUP. Raises HeliosError where it can't start."""
    options = replace(options, host=listen_host(options.host))
    state = options.state
    state.create()
    with state.lock():
        become_subreaper()
        previous = read_mesh(state)
        if previous is not None:
            await asyncio.to_thread(kill_leftovers, previous.processes, timeout_seconds=15.0)
        check_port_free(options.host, options.port, "--port")
        check_port_free("127.0.0.1", options.admin_port, "--admin-port")
        issued = await asyncio.to_thread(issue_due, state)
        state.admin_token()
        report(Progress("certificates", "done", f"issued {len(issued)}" if issued else "valid"))
        stop = stop_on_signals()
        mesh = Mesh(options, report)
        await mesh.run(stop, lambda: on_ready(mesh), lambda: end_within(mesh.stop_seconds))


def stop_on_signals() -> asyncio.Event:
    """Returns what a signal sets that asks for a stop. On the running loop.

    SIGINT counts also where it was ignored before: a shell without job control has it so for what a script starts with
    ``&``, which inherits that, and who sends it to this process, or types Ctrl-C into that script, wants it to end.
    SIGHUP does not: nohup has it ignored, and means it; else a terminal that closes would leave the processes behind.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    return stop


def listen_host(text: str) -> str:
    """Returns an address as Envoy takes it, IPv6 in brackets. Raises InvalidRequest where it is no IP address."""
    try:
        ip = ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError as error:
        raise InvalidRequest(f"--host takes an IP address, such as 127.0.0.1 or 0.0.0.0 (all), not {text!r}") from error
    return f"[{ip}]" if ip.version == 6 else str(ip)


def check_port_free(host: str, port: int, flag: str) -> None:
    """Raises AlreadyExists or InvalidRequest, saying what to do, where a port of a ``listen_host`` can't be bound."""
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(
                f"port {port} on {host} is taken; free it, or choose another one with {flag}", reason="PORT_TAKEN"
            ) from error
        raise InvalidRequest(
            f"can't listen on {host}:{port} ({error.strerror}); choose another --host or {flag}",
            reason="PORT_UNUSABLE",
        ) from error


async def _unless_stopped(work: Coroutine[None, None, None], stop: asyncio.Event) -> bool:
    """Awaits ``work``, raises what it raises and returns True; where ``stop`` is set first, cancels it: False."""
    async with task_scope() as group:
        working = group.create_task(_outcome(work), name="start")
        stopping = group.create_task(stop.wait(), name="wait for stop")
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        error = working.result()
        if error is not None:
            raise error
        return True


async def _outcome(work: Coroutine[None, None, None]) -> HeliosError | None:
    try:
        await work
    except HeliosError as error:
        return error
    return None
