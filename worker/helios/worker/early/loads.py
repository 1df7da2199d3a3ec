"""The supervisor's part of early loads: follows fetches, shows their files, answers loads that ask what is here.

A replica is forked when everything but its weights is here. Its loaders ask at a door of their own what they may read,
and are answered when there is more of it than they know.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, Self

import structlog

from helios.mesh.errors import HeliosError, InvalidRequest
from helios.worker.early.asking import GROWTH, LOADED, POLL_SECONDS
from helios.worker.early.growth import CONFIG, LENGTH_BYTES, EarlyGrowth, Told, needs_every_header
from helios.worker.early.view import EarlyView, remove_view, sweep
from helios.worker.line_door import Document, LineDoor, decode_line
from helios.worker.replica_logs import path_part

log = structlog.get_logger()

_RETRY_SECONDS: Final = 0.5
# Configurations have some KiB; what is larger is none, and its replica is forked when all is here.
_MAX_CONFIG_BYTES: Final = 4 << 20


class Fetches(Protocol):
    """Who tells of fetches: the storage agent's client."""

    def watch_fetch(self, revision: str) -> AsyncGenerator[Told, None]:
        """Yields what is here of a revision whenever that changes; raises HeliosError when the agent goes away."""
        ...


@dataclass(slots=True)
class _Load:
    view: EarlyView
    growth: EarlyGrowth = field(default_factory=EarlyGrowth)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class EarlyLoads:
    """All early loads of a worker. An async context manager; used on one event loop.

    Attributes:
        door: Path of the socket where loads ask.
    """

    def __init__(self, root: Path, door: Path, fetches: Fetches) -> None:
        """Takes the directory for views, this worker's alone, and the path of the socket."""
        self.door = door
        self._root = root
        self._fetches = fetches
        self._loads: dict[str, _Load] = {}
        self._server = LineDoor(door, self._answer)

    async def __aenter__(self) -> Self:
        self._root.mkdir(parents=True, exist_ok=True)
        await self._server.__aenter__()
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._server.__aexit__(*details)
        for load in self._loads.values():
            load.view.close()

    def sweep(self, living: Collection[str]) -> None:
        """Removes what earlier processes left of other replicas than those. Call it before the first ``follow``."""
        sweep(self._root, {path_part(replica_id) for replica_id in living})

    async def follow(self, replica_id: str, revision: str, *, on_enough: Callable[[str], None]) -> None:
        """Follows the fetch of a replica's revision until it is cancelled.

        ``on_enough`` is called once, when a start has something to do, with the directory that is to be its model's.
        Where that is never so, or what is here can't be shown, nothing is lost but time.
        """
        link = self._link(replica_id)
        load = self._loads[replica_id] = _Load(EarlyView(link))
        while not load.growth.is_lost:
            try:
                async with aclosing(self._fetches.watch_fetch(revision)) as changes:
                    async for told in changes:
                        if self._take(load, told):
                            log.info("load begins before all is here", replica=replica_id, revision=revision)
                            on_enough(str(link))
            except HeliosError as error:
                log.debug("no word of the fetch", revision=revision, reason=error.reason)
            except OSError as error:
                log.warning("files on their way can't be shown", replica=replica_id, error=str(error))
                return
            finally:
                if not load.growth.is_lent:
                    load.growth.break_off()
                    load.wake()
            await asyncio.sleep(_RETRY_SECONDS)

    def lend(self, replica_id: str, path: str) -> bool:
        """The revision is lent; returns whether what was read of it counts. Loads that wait for that go on."""
        load = self._loads.get(replica_id)
        if load is None or not load.growth.has_begun:
            self.drop(replica_id)
            return True
        try:
            is_same = load.view.lend(Path(path))
        except OSError as error:
            log.warning("what is lent can't be shown", replica=replica_id, error=str(error))
            return False
        load.growth.lend(is_same=is_same)
        load.wake()
        return load.growth.counts

    def drop(self, replica_id: str) -> None:
        """Removes all of a replica that has ended, or that reads what is lent. Idempotent."""
        load = self._loads.pop(replica_id, None)
        if load is not None:
            load.is_over = True
            load.view.close()
            load.wake()
        remove_view(self._link(replica_id))

    def _link(self, replica_id: str) -> Path:
        return self._root.absolute() / path_part(replica_id)

    def _take(self, load: _Load, told: Told) -> bool:
        """Takes what is told; returns whether the start can begin now."""
        load.growth.take(told)
        if load.growth.is_lost and not load.growth.has_begun:
            # Of a fetch that nobody has read of yet.
            load.view.close()
            load.growth = EarlyGrowth()
            load.growth.take(told)
        if not load.growth.is_lost:
            load.view.show(told.files)
        load.wake()
        if load.growth.has_begun or not load.growth.may_begin or not self._is_enough(load):
            return False
        load.growth.has_begun = True
        return True

    @staticmethod
    def _is_enough(load: _Load) -> bool:
        try:
            config = json.loads(load.view.read(CONFIG, _MAX_CONFIG_BYTES))
        except ValueError:
            return False
        if not isinstance(config, dict):
            return False
        headers = (_has_header(load, path) for path in load.growth.weights)
        return all(headers) if needs_every_header(config) else any(headers)

    async def _answer(self, line: bytes) -> Document:
        asked = decode_line(line)
        load = self._loads.get(str(asked.get("replica_id")))
        if load is None:
            return {"is_over": True}
        match asked.get("ask"):
            case what if what == LOADED:
                return {"counts": load.growth.note_loaded()}
            case what if what == GROWTH:
                await _wait_newer(load, asked.get("version"))
                return {**load.growth.to_document(), "is_over": load.is_over}
        raise InvalidRequest("a load asks something unknown")


def _has_header(load: _Load, path: str) -> bool:
    if not load.growth.covers(path, 0, LENGTH_BYTES):
        return False
    length = int.from_bytes(load.view.read(path, LENGTH_BYTES), "little")
    return load.growth.covers(path, 0, LENGTH_BYTES + length)


async def _wait_newer(load: _Load, version: object) -> None:
    """Waits until more is known than that, for no longer than a load waits for an answer."""
    try:
        async with asyncio.timeout(POLL_SECONDS):
            while load.growth.version == version and not load.is_over:
                await load.changed.wait()
    except TimeoutError:
        pass
