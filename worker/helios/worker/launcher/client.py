"""The supervisor's end of the launchers of one engine: starts them, asks for replicas, hears of exits, replaces them.

A pool is a generation: one process imports, and the others are forks of it, which share its memory and only wait. When
one dies, the next start goes to another at once, and the next generation imports meanwhile; as soon as it is ready, the
old one ends. So a launcher's death is nobody's disaster: replicas live on (their parent becomes the supervisor, which
is a subreaper), a fork that was under way fails as Unavailable, and only a pool that died as a whole is waited for.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Self

import structlog

from helios.mesh.errors import Corrupted, DeadlineExceeded, PreconditionFailed, Unavailable
from helios.mesh.tasks import keep_running
from helios.worker.launcher.messages import Decoder, Exited, Fork, Forked, Message, Ready, Refused, encode
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()

# Far above the replicas of one worker (8 slots): full only where nobody reads, and then exits must not pile up.
_EXIT_QUEUE_SIZE: Final = 1024
_READ_BYTES: Final = 64 << 10
_STOP_SECONDS: Final = 5.0
_REAP_PAUSE_SECONDS: Final = 0.02

# Read by libraries at import, so they must be there before the launcher's first import.
_ENVIRONMENT: Final = {
    # NumPy's and SciPy's OpenBLAS start a thread pool at import otherwise, and a fork copies only one thread.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # Large blocks of malloc are huge pages where the kernel has them to give: a hundred thousand page faults fewer in a
    # start (0.1 s of CPU with SmolLM2-135M), and a fork copies fewer page tables. Unknown to other C libraries.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    # OpenAI's bound of `n`. vLLM's own (16384) lets one request of a few bytes occupy the engine for minutes.
    "VLLM_MAX_N_SEQUENCES": "128",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # vLLM's records go through the handler of the replica's process, as JSON.
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_LOGGING_COLOR": "0",
    # The process that schedules computes too. With a process between them, scheduler and worker wait for each other by
    # spinning, which on a machine with few cores costs a third of the tokens (measured with two busy cores and
    # SmolLM2-135M, at 1 / 8 / 32 streams: 37 / 206 / 250 tokens/s apart, 50 / 273 / 490 together), and one start more.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Binding by environment variables comes too late in a fork; the engine's adapter binds.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Handlers that gRPC would run around every fork; there is no gRPC object when a fork happens.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}


@dataclass(frozen=True, slots=True)
class ForkedReplica:
    """The front process of a new replica; pid and start_ticks together name one process for good."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class ReplicaExit:
    """A front process is gone and reaped. ``status`` is its exit code, or minus the signal that killed it."""

    pid: int
    start_ticks: int
    status: int


def launcher_environment(base: Mapping[str, str], search_path: Sequence[str] = ()) -> dict[str, str]:
    """Returns the environment of the launcher: ``base``, modules of ``search_path``, what libraries find at import."""
    cleaned = {name: value for name, value in base.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    if search_path:
        cleaned["PYTHONPATH"] = os.pathsep.join(filter(None, (*search_path, base.get("PYTHONPATH", ""))))
    return cleaned | _ENVIRONMENT


@dataclass(slots=True, eq=False)
class _Connection:
    """One launcher; ``pid`` is 0 until it is ready."""

    writer: asyncio.StreamWriter
    pid: int = 0
    forks: dict[int, asyncio.Future[ForkedReplica]] = field(default_factory=dict)

    async def close(self) -> None:
        """Ends the launcher once it has answered."""
        if self.forks:
            await asyncio.wait(self.forks.values(), timeout=_STOP_SECONDS)
        self.writer.close()


@dataclass(slots=True, eq=False)
class _Generation:
    """The launchers that came of one import; ``lost`` is set when the first of them is gone."""

    process: asyncio.subprocess.Process
    connections: tuple[_Connection, ...]
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class LauncherClient:
    """Keeps the launchers of an engine alive; open with ``async with``.

    ``exits`` gets one ReplicaExit for every front process that ended while its launcher lived, in order. Exits of
    replicas whose launcher died before them are not seen here: their sessions and pids tell.
    """

    def __init__(
        self,
        *,
        engine: str = "vllm",
        log_level: Literal["debug", "info", "warning", "error"] = "info",
        exits: asyncio.Queue[ReplicaExit] | None = None,
        search_path: Sequence[str] = (),
        pool_size: int = 1,
    ) -> None:
        """``exits`` takes the exits where several clients share one queue; ``search_path`` goes before PYTHONPATH."""
        self._pool_size = pool_size
        self._arguments = ("--engine", engine, "--log-level", log_level)
        self._group = asyncio.TaskGroup()
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._usable: list[_Connection] = []
        self._former: list[_Generation] = []
        self._numbers = 0
        self._search_path = tuple(search_path)
        self.exits: asyncio.Queue[ReplicaExit] = asyncio.Queue(_EXIT_QUEUE_SIZE) if exits is None else exits
        self.import_seconds = 0.0

    async def __aenter__(self) -> Self:
        """Starts the launchers; ``wait_ready`` says when everything is imported."""
        await self._group.__aenter__()
        self._keeper = self._group.create_task(keep_running("launcher", self._run_once), name="launcher")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the launchers; replicas live on."""
        if self._keeper is not None:
            self._keeper.cancel()
        for generation in self._former:
            self._group.create_task(self._end(generation), name="end launchers")
        await self._group.__aexit__(None, None, None)

    @property
    def pid(self) -> int | None:
        """The launcher that the next fork is asked of; None where none is ready."""
        return self._usable[0].pid if self._usable else None

    @property
    def is_ready(self) -> bool:
        """Whether a launcher is ready to fork."""
        return self._ready.is_set()

    async def wait_ready(self) -> None:
        """Waits until a launcher is ready to fork. Cancel-safe."""
        await self._ready.wait()

    async def fork(self, spec: ReplicaSpec, deadline: float) -> ForkedReplica:
        """Forks a replica; ``deadline`` is on the clock of ``time.monotonic()``. Not idempotent.

        Raises:
            DeadlineExceeded: No launcher was ready, or it did not answer, in time. Where the request had been sent, the
                replica may exist: it attaches and is told to stop there.
            Unavailable: The launcher died with the request.
            PreconditionFailed: The launcher could not make a process, or refused the spec.
        """
        self._numbers += 1
        number = self._numbers
        requested_ns = round(spec.asked_at * 1e9) or time.monotonic_ns()
        future: asyncio.Future[ForkedReplica] = asyncio.get_running_loop().create_future()
        asked: _Connection | None = None
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._ready.wait()
                asked = self._usable[0]
                asked.forks[number] = future
                asked.writer.write(encode(Fork(number, spec.to_document(), requested_ns)))
                await asked.writer.drain()
                return await future
        except TimeoutError as error:
            raise DeadlineExceeded(
                "the launcher did not fork in time", metadata={"replica": spec.replica_id}
            ) from error
        except ConnectionError as error:
            raise Unavailable("the launcher went away", metadata={"replica": spec.replica_id}) from error
        finally:
            if asked is not None:
                asked.forks.pop(number, None)

    async def _run_once(self) -> None:
        generation, readers = await self._start()
        listeners = [
            self._group.create_task(self._listen(generation, *pair), name="listen to launcher")
            for pair in zip(generation.connections, readers, strict=True)
        ]
        try:
            await generation.lost.wait()
        except asyncio.CancelledError:
            await self._end(generation)
            await asyncio.wait(listeners)
            raise
        # Nobody asked it to end. What is left of them serves until the next generation does.
        self._former.append(generation)
        raise Unavailable("a launcher ended by itself", metadata={"usable": str(len(self._usable))})

    async def _start(self) -> tuple[_Generation, list[asyncio.StreamReader]]:
        pairs = [socket.socketpair() for _ in range(self._pool_size)]
        connections: list[_Connection] = []
        readers: list[asyncio.StreamReader] = []
        try:
            try:
                process = await self._spawn([theirs.fileno() for _, theirs in pairs])
            finally:
                for _, theirs in pairs:
                    theirs.close()
            for ours, _ in pairs:
                ours.setblocking(False)
                reader, writer = await asyncio.open_connection(sock=ours)
                readers.append(reader)
                connections.append(_Connection(writer))
        except BaseException:
            for ours, _ in pairs:
                ours.close()
            raise
        return _Generation(process, tuple(connections)), readers

    async def _spawn(self, descriptors: Sequence[int]) -> asyncio.subprocess.Process:
        controls = [argument for descriptor in descriptors for argument in ("--control-fd", str(descriptor))]
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "helios.worker.launcher",
            *controls,
            *self._arguments,
            pass_fds=tuple(descriptors),
            stdin=asyncio.subprocess.DEVNULL,
            # The environment is handed on, not read: the launcher's libraries are configured by it.
            env=launcher_environment(os.environ, self._search_path),  # noqa: TID251
        )

    async def _listen(self, generation: _Generation, connection: _Connection, reader: asyncio.StreamReader) -> None:
        decoder = Decoder()
        try:
            while data := await reader.read(_READ_BYTES):
                for message in decoder.feed(data):
                    await self._take(generation, connection, message)
        except (ConnectionError, Corrupted) as error:
            log.warning("a launcher is given up", pid=connection.pid, error=str(error))
        finally:
            self._lose(connection)
            generation.lost.set()

    async def _take(self, generation: _Generation, connection: _Connection, message: Message) -> None:
        match message:
            case Ready(import_seconds, pid):
                connection.pid, self.import_seconds = pid, import_seconds
                log.info("launcher is ready", pid=pid, import_seconds=round(import_seconds, 3))
                self._use(generation, connection)
            case Forked(number, pid, start_ticks):
                if (future := connection.forks.get(number)) is not None and not future.done():
                    future.set_result(ForkedReplica(pid, start_ticks))
            case Refused(number, text):
                if (future := connection.forks.get(number)) is not None and not future.done():
                    future.set_exception(
                        PreconditionFailed(f"the launcher could not fork: {text}", reason="FORK_REFUSED")
                    )
            case Exited(pid, start_ticks, status):
                await self.exits.put(ReplicaExit(pid, start_ticks, status))
            case Fork():
                log.error("the launcher sent a request", number=message.number)

    def _use(self, generation: _Generation, connection: _Connection) -> None:
        """Takes a launcher that is ready, in place of those of older generations."""
        former, self._former = self._former, []
        old = {one for former_generation in former for one in former_generation.connections}
        order = {one: position for position, one in enumerate(generation.connections)}
        self._usable = sorted({connection, *self._usable} - old, key=lambda one: order.get(one, 0))
        for ended in former:
            self._group.create_task(self._end(ended), name="end launchers")
        self._ready.set()

    def _lose(self, connection: _Connection) -> None:
        """Forgets a launcher that is gone, and fails what was asked of it."""
        if connection in self._usable:
            self._usable.remove(connection)
        if not self._usable:
            self._ready.clear()
        connection.writer.close()
        for future in connection.forks.values():
            if not future.done():
                future.set_exception(Unavailable("the launcher went away"))

    async def _end(self, generation: _Generation) -> None:
        """Closes the sockets, which ends the launchers, and waits for them."""
        for connection in generation.connections:
            if connection in self._usable:
                self._usable.remove(connection)
        if not self._usable:
            self._ready.clear()
        for connection in generation.connections:
            await connection.close()
        process = generation.process
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            # Still importing: it reads its socket only afterwards, and has no children yet.
            process.kill()
            await process.wait()
        for connection in generation.connections:
            if connection.pid not in (0, process.pid):
                await _wait_for_orphan(connection.pid)


async def _wait_for_orphan(pid: int) -> None:
    """Waits for a fork of a launcher that is gone: the child of this process, where it is a subreaper."""
    give_up_at = time.monotonic() + _STOP_SECONDS
    while _is_living_child(pid):
        if time.monotonic() > give_up_at:
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(_REAP_PAUSE_SECONDS)


def _is_living_child(pid: int) -> bool:
    """Whether a child runs; one that is dead is reaped."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False
