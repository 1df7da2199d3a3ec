"""The supervisor's end of the launcher: starts it, asks for replicas, hears of exits, starts it again when it dies.

The launcher's death is nobody's disaster: replicas live on (their parent becomes the supervisor, which is a
subreaper), a fork that was under way fails as Unavailable, and the next one waits for the new launcher.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self

import structlog

from helios.mesh.errors import DeadlineExceeded, PreconditionFailed, Unavailable
from helios.mesh.tasks import keep_running
from helios.worker.launcher.messages import Decoder, Exited, Fork, Forked, Message, Ready, Refused, encode
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()

# Far above the replicas of one worker (8 slots): full only where nobody reads, and then exits must not pile up.
_EXIT_QUEUE_SIZE: Final = 1024
_READ_BYTES: Final = 64 << 10
_STOP_SECONDS: Final = 5.0

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


class LauncherClient:
    """Keeps one launcher alive; open with ``async with``.

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
    ) -> None:
        """``exits`` takes the exits where several launchers share one queue; ``search_path`` goes before PYTHONPATH."""
        self._arguments = ("--engine", engine, "--log-level", log_level)
        self._group = asyncio.TaskGroup()
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = 0
        self._forks: dict[int, asyncio.Future[ForkedReplica]] = {}
        self._search_path = tuple(search_path)
        self.exits: asyncio.Queue[ReplicaExit] = asyncio.Queue(_EXIT_QUEUE_SIZE) if exits is None else exits
        self.pid: int | None = None
        self.import_seconds = 0.0

    async def __aenter__(self) -> Self:
        """Starts the launcher; ``wait_ready`` says when it has imported everything."""
        await self._group.__aenter__()
        self._keeper = self._group.create_task(keep_running("launcher", self._run_once), name="launcher")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the launcher; replicas live on."""
        if self._keeper is not None:
            self._keeper.cancel()
        await self._group.__aexit__(None, None, None)

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
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._ready.wait()
                assert self._writer is not None
                self._forks[number] = future
                self._writer.write(encode(Fork(number, spec.to_document(), requested_ns)))
                await self._writer.drain()
                return await future
        except TimeoutError as error:
            raise DeadlineExceeded(
                "the launcher did not fork in time", metadata={"replica": spec.replica_id}
            ) from error
        except ConnectionError as error:
            raise Unavailable("the launcher went away", metadata={"replica": spec.replica_id}) from error
        finally:
            self._forks.pop(number, None)

    async def _run_once(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await self._spawn(theirs)
            self.pid = process.pid
            ours.setblocking(False)
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        try:
            await self._read(reader)
        finally:
            await self._end(process)
        # Reached only when the launcher closed its end: nobody asked it to.
        raise Unavailable("the launcher ended by itself", metadata={"status": str(process.returncode)})

    async def _spawn(self, control: socket.socket) -> asyncio.subprocess.Process:
        descriptor = control.fileno()
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "helios.worker.launcher",
            "--control-fd",
            str(descriptor),
            *self._arguments,
            pass_fds=(descriptor,),
            stdin=asyncio.subprocess.DEVNULL,
            # The environment is handed on, not read: the launcher's libraries are configured by it.
            env=launcher_environment(os.environ, self._search_path),  # noqa: TID251
        )

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = Decoder()
        while data := await reader.read(_READ_BYTES):
            for message in decoder.feed(data):
                await self._take(message)

    async def _take(self, message: Message) -> None:
        match message:
            case Ready(import_seconds):
                self.import_seconds = import_seconds
                log.info("launcher is ready", pid=self.pid, import_seconds=round(import_seconds, 3))
                self._ready.set()
            case Forked(number, pid, start_ticks):
                if (future := self._forks.get(number)) is not None and not future.done():
                    future.set_result(ForkedReplica(pid, start_ticks))
            case Refused(number, text):
                if (future := self._forks.get(number)) is not None and not future.done():
                    future.set_exception(
                        PreconditionFailed(f"the launcher could not fork: {text}", reason="FORK_REFUSED")
                    )
            case Exited(pid, start_ticks, status):
                await self.exits.put(ReplicaExit(pid, start_ticks, status))
            case Fork():
                log.error("the launcher sent a request", number=message.number)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Closes the socket, which ends the launcher, and fails what was under way."""
        self._ready.clear()
        self.pid = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for future in self._forks.values():
            if not future.done():
                future.set_exception(Unavailable("the launcher went away"))
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            # Still importing: it reads its socket only afterwards, and has no children yet.
            process.kill()
            await process.wait()
