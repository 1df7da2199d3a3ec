"""The event loop's part of fetches from many sources: who has what, claims, and what others may read from here.

Threads call in and return at once. Each fetch has a task for each peer that asks it what it has, answered as soon as
that changes; and one for each claim.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Final, Self

import grpc.aio
import structlog

from helios.api.storage.v1 import blob_service_pb2 as pb
from helios.api.storage.v1.blob_service_pb2_grpc import BlobServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.identity import IdentityFiles
from helios.mesh.tasks import task_scope
from helios.mesh.transfer.source import RangeSource
from helios.mesh.transfer.spans import Span
from helios.storage.chunk_index import ChunkIndex
from helios.storage.manifest import Digest
from helios.storage.peers import PeerSource
from helios.storage.sync.partial import PartialBlobs
from helios.storage.sync.policy import Asked
from helios.storage.sync.session import Peer, SyncSession
from helios.storage.sync.source import SwarmSource

log = structlog.get_logger()

_WAIT_SECONDS: Final = 5.0
"""How long a peer may wait for news before it says that there are none."""

_ANSWER_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 0.5
"""Before a peer that has nothing, or does not answer, is asked again; longer each time that it does not answer."""

_MAX_PAUSE_SECONDS: Final = 5.0


class Swarms:
    """All fetches of this node. An async context manager: leaving forgets them."""

    def __init__(
        self,
        session: SyncSession | None,
        partials: PartialBlobs,
        *,
        identity: IdentityFiles | None,
        targets: Sequence[str] = (),
        parallel: int = 8,
    ) -> None:
        """Takes the session with the registry (None: this node knows of others by `targets` only), and how many reads a
        transfer has at a time.
        """
        self._session = session
        self._partials = partials
        self._identity = identity
        self._targets = targets
        self._parallel = parallel
        self._fetches: dict[SwarmSource, _Fetch] = {}
        self._stack = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop
        self._group: asyncio.TaskGroup

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._group = await self._stack.enter_async_context(task_scope())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def source(
        self, digest: Digest, index: ChunkIndex, store: RangeSource, is_local: Callable[[Span], bool]
    ) -> SwarmSource:
        """A blob for the transfer engine, which tells its end by `ended`."""
        return SwarmSource(
            digest,
            index,
            store,
            self,
            open_peer=lambda address, wanted: PeerSource(address, wanted, identity=self._identity),
            parallel=self._parallel,
            is_local=is_local,
        )

    def begin(self, source: SwarmSource) -> None:
        """A try begins."""
        assert source.target is not None, "a try has a target"
        self._partials.begin(source.digest.hash, source.target)
        self._call(self._begin, source)

    def claim(self, source: SwarmSource, asked: Asked) -> None:
        """Asks for spans to read from the cloud."""
        self._call(self._ask, source, asked)

    def end_claims(self, source: SwarmSource, *, done: Sequence[Span] = (), given_up: Sequence[Span] = ()) -> None:
        """Tells spans that are here, and spans that somebody else is to read."""
        for start, end in done:
            assert source.target is not None, "what is here came to a target"
            self._partials.add(source.digest.hash, source.target, start, end)
        if self._session is not None:
            session = self._session
            self._call(lambda: session.end_claims(source.digest.hash, done=done, given_up=given_up))

    def end(self, source: SwarmSource, *, is_whole: bool) -> None:
        """The fetch has ended."""
        if source.target is not None:
            self._partials.end(source.digest.hash, source.target)
        self._call(self._end, source, is_whole)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        # A loop that is closed has nobody to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _begin(self, source: SwarmSource) -> None:
        fetch = self._fetches.get(source)
        if fetch is None:
            fetch = self._fetches[source] = _Fetch(source, self._partials, self._follow, self._targets)
            fetch.meet([])
        if self._session is not None:
            # Said again where a try begins anew: what was here before is not any more.
            self._session.want(fetch)

    def _end(self, source: SwarmSource, is_whole: bool) -> None:
        fetch = self._fetches.pop(source, None)
        if fetch is None:
            return
        if self._session is not None:
            self._session.unwant(fetch, is_whole=is_whole)
        for task in fetch.tasks:
            task.cancel()

    def _ask(self, source: SwarmSource, asked: Asked) -> None:
        fetch = self._fetches.get(source)
        if fetch is not None:
            self._start(fetch, self._make_claim(fetch, asked), "claim")
        else:
            source.answered(())

    async def _make_claim(self, fetch: "_Fetch", asked: Asked) -> None:
        granted: Sequence[Span] = asked.spans[: asked.limit]
        try:
            if self._session is not None:
                answer = await self._session.claim(
                    fetch.hash, asked.spans, limit=asked.limit, excluded=asked.excluded_nodes
                )
                if answer is not None:
                    granted = answer.granted
                    fetch.meet_more(answer.holders)
        except asyncio.CancelledError:
            granted = ()
            raise
        finally:
            fetch.source.answered(granted)

    def _follow(self, fetch: "_Fetch", address: str) -> None:
        self._start(fetch, self._watch(fetch, address), f"chunks of {address}")

    def _start(self, fetch: "_Fetch", work: "asyncio._CoroutineLike[None]", name: str) -> None:
        task = self._group.create_task(work, name=name)
        fetch.tasks.add(task)
        task.add_done_callback(fetch.tasks.discard)

    async def _watch(self, fetch: "_Fetch", address: str) -> None:
        """Asks a peer what it has, until that is all."""
        version = 0
        pause_seconds = _PAUSE_SECONDS
        async with Dialer(address, identity=self._identity, peer="storage") as dialer:
            while True:
                request = pb.FindChunksRequest(hash=fetch.hash, known_version=version)
                request.wait.FromTimedelta(timedelta(seconds=_WAIT_SECONDS))
                try:
                    answer = await dialer.stub(BlobServiceStub).FindChunks(
                        request, timeout=_WAIT_SECONDS + _ANSWER_SECONDS
                    )
                except grpc.aio.AioRpcError as error:
                    report = log.info if pause_seconds == _PAUSE_SECONDS else log.debug
                    report("peer does not answer", peer=address, code=str(error.code()))
                    fetch.source.unreached(address)
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)
                    continue
                pause_seconds = _PAUSE_SECONDS
                spans = [(span.offset, span.offset + span.length) for span in answer.spans]
                version = answer.version
                fetch.source.has(address, spans, is_whole=answer.is_whole)
                if answer.is_whole:
                    return
                if not version:
                    await asyncio.sleep(_PAUSE_SECONDS)


class _Fetch:
    """One fetch, as a session sees it. Used on the event loop."""

    def __init__(
        self,
        source: SwarmSource,
        partials: PartialBlobs,
        follow: "Callable[[_Fetch, str], None]",
        targets: Sequence[str],
    ) -> None:
        self.source = source
        self.tasks: set[asyncio.Task[None]] = set()
        self._partials = partials
        self._follow = follow
        self._targets = targets

    @property
    def hash(self) -> str:
        return self.source.digest.hash

    @property
    def size_bytes(self) -> int:
        return self.source.digest.size_bytes

    def held(self) -> list[Span]:
        return self._partials.spans(self.hash)

    def meet(self, peers: Sequence[Peer]) -> None:
        known = [(target, target, False) for target in self._targets]
        self._meet([*known, *((peer.address, peer.node, peer.is_whole) for peer in peers)], is_all=True)

    def meet_more(self, peers: Sequence[Peer]) -> None:
        """Takes some more who hold the blob."""
        self._meet([(peer.address, peer.node, peer.is_whole) for peer in peers], is_all=False)

    def _meet(self, peers: Sequence[tuple[str, str, bool]], *, is_all: bool) -> None:
        for address in self.source.meet(peers, is_all=is_all):
            self._follow(self, address)
