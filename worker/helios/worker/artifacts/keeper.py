"""Brings artifacts to the node and offers what was made here: the part of the supervisor between replicas and registry.

    take:   find in the registry → borrow from the storage agent (fetched, verified) → install → the replica uses it
    proven: the replica answered → wait until nobody writes → pack → put into the registry, unless it has one

Packed weights are taken by nobody who waits (``engines/vllm/packing``): they have a longer time, and belong to no
replica. A start that finds them of no use says so, by itself or by its end, and the next one's maker tells it here
(``note_refused``).

Every step may fail, and then the replica makes what it did not get. An artifact under which a replica failed is taken
no more and deleted from the registry: a bad one costs one start on one node, not one on each. One that did not spare
the replica its work is replaced by what that made.
"""

import asyncio
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import structlog

from helios.mesh.errors import Corrupted, HeliosError
from helios.registry.client import Artifact
from helios.worker.artifacts.requests import PACKED_WEIGHTS, ArtifactRequest
from helios.worker.artifacts.shelf import Cancelled
from helios.worker.settings import ArtifactSettings
from helios.worker.supervisor import metrics

log = structlog.get_logger()

K = TypeVar("K")
V = TypeVar("V")

# Of the borrowed bytes, which are copied in well under a second.
_LEASE_SECONDS: Final = 30.0
# vLLM and torch write while they compile and during the first request, never later.
_QUIET_SECONDS: Final = 2.0
_QUIET_TRIES: Final = 30
_PUBLISH_PAUSES_SECONDS: Final = (10.0, 60.0, 300.0)
# Keys under which replicas failed, and replicas that use something foreign and have proved nothing yet.
_REMEMBERED: Final = 1_000


class Shelf(Protocol):
    """Where artifacts of one kind are on this node. Methods block; ``CompileShelf`` says what they promise."""

    def has(self, key: str) -> bool: ...
    def is_offered(self, key: str) -> bool: ...
    def install(self, key: str, files: Path, stop: threading.Event) -> str: ...
    def state(self, key: str) -> str: ...
    def pack(self, key: str, into: Path) -> Mapping[str, Path]: ...


class Registry(Protocol):
    """The registry's artifacts: ``ArtifactClient``, which says what the calls promise."""

    async def find(self, kind: str, key: str, *, timeout_seconds: float = ...) -> Artifact | None: ...
    async def put(
        self,
        *,
        kind: str,
        inputs: str,
        revision: str,
        producer: str,
        files: Mapping[str, Path],
        timeout_seconds: float,
    ) -> tuple[Artifact, bool]: ...
    async def delete(self, kind: str, key: str, *, digest: str) -> int: ...


class Lent(Protocol):
    """Files that are lent."""

    path: str


class Lender(Protocol):
    """The storage agent: lends what has this digest, fetched and verified, for the block. Raises HeliosError."""

    def materialize(
        self, revision: str, *, holder: str, ttl_seconds: float, lease_id: str | None, keep: bool
    ) -> AbstractAsyncContextManager[Lent]: ...


@dataclass(frozen=True, slots=True)
class _Given:
    artifact: Artifact
    state: str


class ArtifactKeeper:
    """Artifacts of one worker. Lives in its event loop; ``group`` runs what nobody waits for.

    ``scratch`` is an empty directory of its own, where artifacts are packed.
    """

    def __init__(
        self,
        settings: ArtifactSettings,
        *,
        group: asyncio.TaskGroup,
        registry: Registry,
        lender: Lender,
        shelves: Mapping[str, Shelf],
        producer: str,
        scratch: Path,
        quiet_seconds: float = _QUIET_SECONDS,
    ) -> None:
        self._settings = settings
        self._group = group
        self._registry = registry
        self._lender = lender
        self._shelves = shelves
        self._producer = producer
        self._scratch = scratch
        self._quiet_seconds = quiet_seconds
        self._taking: dict[tuple[str, str], asyncio.Lock] = {}
        self._takers: Counter[tuple[str, str]] = Counter()
        self._given: OrderedDict[str, _Given] = OrderedDict()
        self._brought: OrderedDict[tuple[str, str], Artifact] = OrderedDict()
        self._distrusted: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._publishing = asyncio.Semaphore(1)

    async def take(self, request: ArtifactRequest) -> str:
        """Brings an artifact to the node; returns why not, empty where it is there."""
        name = (request.kind, request.key)
        if not self._settings.take:
            return "this worker takes nothing from others"
        if request.kind not in self._shelves:
            return f"unknown kind {request.kind[:63]!r}"
        if name in self._distrusted:
            return "a replica failed under it"
        is_large = request.kind == PACKED_WEIGHTS
        seconds = self._settings.take_weights_seconds if is_large else self._settings.take_seconds
        # One at a time of a name: the second finds what the first one brought.
        self._takers[name] += 1
        try:
            async with asyncio.timeout(seconds), self._taking.setdefault(name, asyncio.Lock()):
                why = await self._bring(request, seconds)
        except TimeoutError:
            why = f"it was not here after {seconds:g} s"
            log.warning("artifact not taken in time", kind=request.kind, key=request.key)
        finally:
            self._takers[name] -= 1
            if not self._takers[name]:
                del self._takers[name]
                self._taking.pop(name, None)
        metrics.ARTIFACTS.labels("not_taken" if why else "taken").inc()
        return why

    def note_proven(self, request: ArtifactRequest) -> None:
        """Publishes what a replica used, where the registry has nothing of the kind, or has what was of no use."""
        given = self._given.pop(request.replica_id, None)
        if self._settings.publish and request.kind in self._shelves:
            self._group.create_task(self._offer(request, given), name=f"publish {request.kind}")

    def note_refused(self, request: ArtifactRequest) -> None:
        """Trusts nobody's artifact of this name any more, and withdraws the one that was brought here, if one was."""
        name = (request.kind, request.key)
        _remember(self._distrusted, name, None)
        artifact = self._brought.pop(name, None)
        log.warning("no start with an artifact went well", kind=request.kind, key=request.key, is_own=artifact is None)
        if artifact is not None:
            self._group.create_task(self._withdraw(artifact), name=f"withdraw {artifact.kind}")

    def note_end(self, replica_id: str, *, is_failure: bool) -> None:
        """Takes notice that a replica ended. One that failed on something foreign, and proved nothing, is a warning."""
        given = self._given.pop(replica_id, None)
        if given is None or not is_failure:
            return
        artifact = given.artifact
        log.warning("a replica failed with an artifact of another worker", **_facts(artifact), replica=replica_id)
        _remember(self._distrusted, (artifact.kind, artifact.key), None)
        self._group.create_task(self._withdraw(artifact), name=f"withdraw {artifact.kind}")

    async def _bring(self, request: ArtifactRequest, timeout_seconds: float) -> str:
        shelf = self._shelves[request.kind]
        artifact: Artifact | None = None
        try:
            if await asyncio.to_thread(shelf.has, request.key):
                return ""
            artifact = await self._registry.find(request.kind, request.key, timeout_seconds=timeout_seconds)
            if artifact is None:
                return "nobody has made it yet"
            if (artifact.inputs, artifact.revision) != (request.inputs, request.revision):
                # The registry checks that a key is its inputs' digest; this does not depend on it.
                return "the registry has something else under this name"
            state = await self._install(shelf, artifact)
        except HeliosError as error:
            log.warning(
                "artifact not taken", kind=request.kind, key=request.key, reason=error.reason, error=error.message
            )
            if artifact is not None and isinstance(error, Corrupted):
                self._group.create_task(self._withdraw(artifact), name=f"withdraw {artifact.kind}")
            return error.reason
        except OSError as error:
            log.warning("artifact not installed", kind=request.kind, key=request.key, error=str(error))
            return "it can't be written here"
        _remember(self._brought, (artifact.kind, artifact.key), artifact)
        if request.replica_id:
            _remember(self._given, request.replica_id, _Given(artifact, state))
        log.info("artifact taken", **_facts(artifact), replica=request.replica_id)
        return ""

    async def _install(self, shelf: Shelf, artifact: Artifact) -> str:
        holder = f"{self._producer}/{artifact.kind}"
        stop = threading.Event()
        async with self._lender.materialize(
            artifact.digest, holder=holder, ttl_seconds=_LEASE_SECONDS, lease_id=None, keep=False
        ) as lent:
            try:
                return await asyncio.to_thread(shelf.install, artifact.key, Path(lent.path), stop)
            except Cancelled as error:
                raise TimeoutError from error
            finally:
                # The thread of a caller that is cancelled goes on until it sees this.
                stop.set()

    async def _offer(self, request: ArtifactRequest, given: _Given | None) -> None:
        for pause_seconds in (*_PUBLISH_PAUSES_SECONDS, None):
            try:
                async with self._publishing:
                    await self._publish(request, given)
                return
            except OSError as error:
                log.warning("artifact can't be packed", kind=request.kind, key=request.key, error=str(error))
                return
            except HeliosError as error:
                log.warning("artifact not published", kind=request.kind, reason=error.reason, error=error.message)
                if pause_seconds is None or error.grpc_code != "UNAVAILABLE":
                    return
            await asyncio.sleep(pause_seconds)

    async def _publish(self, request: ArtifactRequest, given: _Given | None) -> None:
        shelf = self._shelves[request.kind]
        if not await asyncio.to_thread(shelf.is_offered, request.key):
            return
        existing = await self._registry.find(request.kind, request.key)
        if existing is not None and (given is None or given.artifact.digest != existing.digest):
            return
        state = await self._wait_quiet(shelf, request.key)
        if not state or (given is not None and state == given.state):
            return
        with tempfile.TemporaryDirectory(dir=self._scratch) as directory:
            files = await asyncio.to_thread(shelf.pack, request.key, Path(directory))
            if await asyncio.to_thread(shelf.state, request.key) != state:
                log.info("artifact not published: it is being written to", kind=request.kind, key=request.key)
                return
            if existing is not None:
                # It was taken, and everything was made anew beside it.
                log.warning("an artifact was of no use and is replaced", **_facts(existing))
                await self._registry.delete(existing.kind, existing.key, digest=existing.digest)
            stored, is_new = await self._registry.put(
                kind=request.kind,
                inputs=request.inputs,
                revision=request.revision,
                producer=self._producer,
                files=files,
                timeout_seconds=self._settings.publish_seconds,
            )
        if is_new:
            metrics.ARTIFACTS.labels("published").inc()
            log.info("artifact published", **_facts(stored))

    async def _wait_quiet(self, shelf: Shelf, key: str) -> str:
        """Returns the state that a directory keeps for a while; empty where it never rests."""
        state = await asyncio.to_thread(shelf.state, key)
        for _ in range(_QUIET_TRIES):
            await asyncio.sleep(self._quiet_seconds)
            before, state = state, await asyncio.to_thread(shelf.state, key)
            if state == before:
                return state
        return ""

    async def _withdraw(self, artifact: Artifact) -> None:
        try:
            await self._registry.delete(artifact.kind, artifact.key, digest=artifact.digest)
        except HeliosError as error:
            log.warning("artifact not deleted", **_facts(artifact), reason=error.reason)


def _facts(artifact: Artifact) -> dict[str, object]:
    return {
        "kind": artifact.kind,
        "key": artifact.key,
        "digest": artifact.digest,
        "size_bytes": artifact.size_bytes,
        "producer": artifact.producer,
    }


def _remember(memory: OrderedDict[K, V], key: K, value: V) -> None:
    memory[key] = value
    while len(memory) > _REMEMBERED:
        memory.popitem(last=False)
