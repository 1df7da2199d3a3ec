"""The steps of one push.

hold its blobs → look (what the target has) → send what it lacks → commit (the manifest)
"""

import asyncio
import io
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import BinaryIO, Final, Self
from weakref import WeakValueDictionary

from helios.mesh.errors import Corrupted, InvalidRequest
from helios.registry.blobs import Blobs
from helios.registry.manifest import Digest, Manifest
from helios.registry.progress import ProgressLog
from helios.registry.push.journal import PushJournal
from helios.registry.push.records import PushDone
from helios.registry.push.settings import PushSettings
from helios.registry.push.target import OciTarget
from helios.registry.push.upload import BlobUpload
from helios.registry.records import PushPhase, Revision
from helios.registry.sources.each import each
from helios.registry.sources.reference import OciReference, parse_reference

# Questions at a time: round trips to a far registry overlap, none of its limits is near.
_LOOKS: Final = 8
# Of blobs that were pushed, where they are: some hundred models of a hundred files.
_MAX_REMEMBERED: Final = 10_000
# The config that every manifest names: OCI's empty one.
_EMPTY: Final = b"{}"
_EMPTY_DIGEST: Final = Digest("44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", len(_EMPTY))


class _Turn:
    """Whose turn it is to send a blob to a repository, and whether it was sent."""

    def __init__(self) -> None:
        self.is_sent = False
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._lock.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


class Places:
    """Which repositories were seen to have blobs, of the last some thousand: a registry mounts them from there."""

    def __init__(self) -> None:
        self._places: OrderedDict[tuple[str, str], str] = OrderedDict()

    def find(self, reference: OciReference, digest: Digest, revision: Revision) -> str:
        """Returns another repository of the same host that has, or had, a blob; empty where none is known."""
        place = self._places.get((reference.host, digest.hash), "")
        source = parse_reference(revision.source)
        if not place and isinstance(source, OciReference) and source.host == reference.host:
            place = source.repository
        return place if place != reference.repository else ""

    def remember(self, reference: OciReference, digests: Collection[Digest]) -> None:
        """Takes note that a repository has blobs."""
        for digest in digests:
            self._places[reference.host, digest.hash] = reference.repository
            self._places.move_to_end((reference.host, digest.hash))
        while len(self._places) > _MAX_REMEMBERED:
            self._places.popitem(last=False)


class Push:
    """What pushes do, and what they share. Belongs to the event loop."""

    def __init__(self, blobs: Blobs, journal: PushJournal, settings: PushSettings) -> None:
        self._blobs = blobs
        self._journal = journal
        self._settings = settings
        self._places = Places()
        # One upload of a blob to a repository at a time; a turn lives for as long as a push may want it.
        self._turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()

    async def run(self, revision: Revision, manifest: Manifest, target: OciTarget, progress: ProgressLog) -> PushDone:
        """Pushes a revision. Raises HeliosError, as PushModel in the contract."""
        progress.begin(PushPhase.LOOK)
        reference = target.reference
        if reference.digest and reference.digest != revision.digest:
            raise InvalidRequest(
                f"the revision has the digest {revision.digest}, and can't be pushed as {reference.digest}",
                reason="INVALID_TARGET",
                metadata={"param": "target"},
            )
        digests = {entry.digest for entry in manifest.entries}
        done = PushDone(
            revision.digest, str(OciReference(reference.host, reference.repository, digest=revision.digest)), 0, 0
        )
        with self._blobs.hold() as hold:
            if not await hold.take(list(digests)):
                raise Corrupted(
                    f"blobs of {revision.digest} are missing from the registry's store; add the model again",
                    reason="BLOB_MISSING",
                )
            mounts = {digest: self._places.find(reference, digest, revision) for digest in digests}
            target.mount_from({name for name in mounts.values() if name})
            if await target.find_manifest() == revision.digest:
                return PushDone(done.revision, done.location, 0, _total(digests))
            # From before the look on: what another push sends between that and its own turn is not missing any more.
            turns = {digest: self._turn(target, digest) for digest in digests | {_EMPTY_DIGEST}}
            missing = await self._missing(target, turns)
            progress.begin(PushPhase.SEND, _total(missing))
            sent = await self._send_all(target, {digest: turns[digest] for digest in missing}, mounts, progress)
            progress.begin(PushPhase.COMMIT)
            await target.put_manifest(manifest.canonical_json(), revision.digest)
        self._places.remember(reference, digests)
        # The model's own bytes: the config that the manifest names is none of its files.
        sent_bytes = sum(count for digest, count in sent.items() if digest in digests)
        return PushDone(done.revision, done.location, sent_bytes, _total(digests) - sent_bytes)

    async def _missing(self, target: OciTarget, digests: Collection[Digest]) -> list[Digest]:
        """Returns what the target lacks, the largest first: each goes by itself, and the last is waited for alone."""
        missing: list[Digest] = []

        async def look(digest: Digest) -> None:
            if not await target.has(digest):
                missing.append(digest)

        await each(digests, look, at_once=_LOOKS)
        return sorted(missing, key=lambda digest: (-digest.size_bytes, digest.hash))

    async def _send_all(
        self, target: OciTarget, missing: Mapping[Digest, _Turn], mounts: Mapping[Digest, str], progress: ProgressLog
    ) -> dict[Digest, int]:
        """Returns how many bytes of each blob were sent."""
        sent: dict[Digest, int] = {}

        async def send(digest: Digest) -> None:
            async with missing[digest] as turn:
                if turn.is_sent and await target.has(digest):
                    # Another push has sent it meanwhile.
                    progress.advance(digest.size_bytes)
                    sent[digest] = 0
                    return
                sent[digest] = await self._send(target, digest, mounts.get(digest, ""), progress)
                turn.is_sent = True

        await each(list(missing), send, at_once=self._settings.in_flight)
        return sent

    async def _send(self, target: OciTarget, digest: Digest, mount: str, progress: ProgressLog) -> int:
        upload = BlobUpload(
            target,
            digest,
            self._opener(digest),
            self._journal,
            chunk_bytes=self._settings.chunk_bytes,
            on_bytes=progress.advance,
        )
        return await upload.run(mount)

    def _turn(self, target: OciTarget, digest: Digest) -> _Turn:
        return self._turns.setdefault(f"{target.name} {digest}", _Turn())

    def _opener(self, digest: Digest) -> Callable[[], BinaryIO]:
        if digest == _EMPTY_DIGEST:
            return lambda: io.BytesIO(_EMPTY)
        return partial(self._blobs.store.open, digest.hash)


def _total(digests: Collection[Digest]) -> int:
    return sum(digest.size_bytes for digest in digests)
