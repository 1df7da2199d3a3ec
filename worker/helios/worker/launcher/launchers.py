"""A pool of launchers for each engine, started by the first replica of it.

Each engine's libraries are imported in a process of their own: a replica of one engine carries nothing of another, and
an engine that nobody uses costs nothing; one that nobody has used for long gives its launchers up again. A launcher has
read its packages from the disk once; when packages are installed or removed it is replaced, at the latest before the
next fork, since a child would import the new files beside the old ones.
"""

import asyncio
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import structlog

from helios.worker.launcher.client import ForkedReplica, LauncherClient, ReplicaExit
from helios.worker.replica.spec import ReplicaSpec

log = structlog.get_logger()

# Far above the replicas of one worker (8 slots): full only where nobody reads, and then exits must not pile up.
_EXIT_QUEUE_SIZE = 1024
# Listing 250 packages takes a millisecond. Whoever installs some is then ahead of the next start by seconds.
_LOOK_SECONDS = 30.0

Packages = frozenset[str]


@dataclass(slots=True)
class _Kept:
    """A launcher that is kept alive.

    Attributes:
        packages: What was installed when it was started.
        fork_count: Forks that were asked of it and are not over.
        used_at: When the last of them was asked, on the monotonic clock.
        is_retired: It is to end when they are.
    """

    client: LauncherClient
    packages: Packages
    task: asyncio.Task[None]
    fork_count: int = 0
    used_at: float = field(default_factory=time.monotonic)
    is_retired: bool = False

    def retire(self) -> None:
        """Ends it, at once or with the last fork that is under way."""
        self.is_retired = True
        self.end_if_unused()

    def end_if_unused(self) -> None:
        """Ends a retired launcher that has nothing left to do."""
        if self.is_retired and not self.fork_count:
            self.task.cancel()


class Launchers:
    """All launchers of a worker; open with ``async with``.

    ``exits`` gets the exits of every launcher's replicas, as ``LauncherClient.exits`` does.
    """

    def __init__(
        self,
        *,
        log_level: Literal["debug", "info", "warning", "error"] = "info",
        search_path: tuple[str, ...] = (),
        pool_size: int = 1,
        lasting: frozenset[str] = frozenset(),
        idle_seconds: float = 0.0,
    ) -> None:
        """Takes what holds for all of them.

        Args:
            log_level: Of their records.
            search_path: Where users' classes are, ahead of PYTHONPATH; only the engine "custom" looks there.
            pool_size: Launchers of an engine.
            lasting: Engines whose launchers stay, used or not.
            idle_seconds: Those of the others end when they were not used for so long; 0: they stay.
        """
        self._pool_size = pool_size
        self._lasting = lasting
        self._idle_seconds = idle_seconds
        self._log_level: Literal["debug", "info", "warning", "error"] = log_level
        self._search_path = search_path
        self._group = asyncio.TaskGroup()
        self._kept: dict[str, _Kept] = {}
        self.exits: asyncio.Queue[ReplicaExit] = asyncio.Queue(_EXIT_QUEUE_SIZE)

    async def __aenter__(self) -> Self:
        """Starts no launcher yet."""
        await self._group.__aenter__()
        self._looking = self._group.create_task(self._look(), name="look after launchers")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends all launchers; replicas live on."""
        self._looking.cancel()
        for kept in self._kept.values():
            kept.task.cancel()
        await self._group.__aexit__(None, None, None)

    async def wait_ready(self, engine: str) -> None:
        """Starts the launcher of an engine where there is none, and waits until it is ready to fork. Cancel-safe."""
        await (await self._launcher(engine)).client.wait_ready()

    async def fork(self, spec: ReplicaSpec, deadline: float) -> ForkedReplica:
        """Forks a replica of the spec's engine; promises and errors are those of ``LauncherClient.fork``."""
        kept = await self._launcher(spec.engine)
        kept.fork_count += 1
        kept.used_at = time.monotonic()
        try:
            return await kept.client.fork(spec, deadline)
        finally:
            kept.fork_count -= 1
            kept.end_if_unused()

    def end_idle(self, now: float) -> None:
        """Ends the launchers of engines that nobody used for long; replicas live on."""
        for engine, kept in list(self._kept.items()):
            is_idle = self._idle_seconds and now - kept.used_at >= self._idle_seconds and not kept.fork_count
            if is_idle and kept.client.is_ready and engine not in self._lasting:
                log.info("launcher is not used: it ends", engine=engine)
                del self._kept[engine]
                kept.retire()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            self.end_idle(time.monotonic())
            for engine in list(self._kept):
                await self._launcher(engine)

    async def _launcher(self, engine: str) -> _Kept:
        # In a thread: a disk that is slow, or far away, must not hold up the sessions of all replicas.
        packages = await asyncio.to_thread(installed_packages)
        kept = self._kept.get(engine)
        # One that still imports is left alone: somebody waits for it.
        if kept is not None and kept.packages != packages and kept.client.is_ready:
            log.info(
                "packages changed: launcher is replaced", engine=engine, changed=sorted(kept.packages ^ packages)[:5]
            )
            kept.retire()
            kept = None
        if kept is None:
            client = LauncherClient(
                engine=engine,
                log_level=self._log_level,
                exits=self.exits,
                # A file there that is named like a package must not take that package's place in another engine.
                search_path=self._search_path if engine == "custom" else (),
                pool_size=self._pool_size,
            )
            task = self._group.create_task(_keep(client), name=f"launcher {engine}")
            kept = self._kept[engine] = _Kept(client, packages, task)
        return kept


async def _keep(client: LauncherClient) -> None:
    async with client:
        await asyncio.get_running_loop().create_future()


def installed_packages() -> Packages:
    """Returns the names, which hold the versions, of all distributions that a new Python process would find. Blocks."""
    found: set[str] = set()
    for folder in map(Path, sys.path):
        if folder.is_dir():
            found.update(path.name for path in folder.glob("*.dist-info"))
    return frozenset(found)
