"""The replica's side of the door: asks before the engine is made, and says afterwards what has proved good.

Whatever goes wrong on the way is a warning: the replica then makes what it did not get.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from helios.mesh.errors import InvalidRequest
from helios.worker import line_door
from helios.worker.artifacts.requests import ArtifactRequest, Ask, encode_request

log = structlog.get_logger()

# The supervisor keeps its own time; this is for one that hangs.
_GRACE_SECONDS: Final = 2.0
_LOOK_SECONDS: Final = 1.0
# A supervisor that is replaced is back within a minute; after that a later start tells.
_TELL_TRIES: Final = 12
_TELL_PAUSE_SECONDS: Final = 5.0
_TELL_SECONDS: Final = 5.0


def take(door: str, request: ArtifactRequest, *, timeout_seconds: float) -> bool:
    """Has the supervisor bring an artifact to the node; returns whether it is there. Blocks, and starts no thread."""
    try:
        answer = _ask(door, Ask.TAKE, request, timeout_seconds + _GRACE_SECONDS)
    except (OSError, InvalidRequest) as error:
        log.warning("no artifact: the supervisor can't be asked", kind=request.kind, error=str(error))
        return False
    if answer.get("is_here") is True:
        log.info("artifact taken", kind=request.kind, key=request.key)
        return True
    log.info("no artifact", kind=request.kind, key=request.key, why=answer.get("why"))
    return False


def refuse(door: str, request: ArtifactRequest) -> None:
    """Tells the supervisor that no start with an artifact went well, so that it is not taken again. Blocks."""
    try:
        _ask(door, Ask.REFUSED, request, _TELL_SECONDS)
    except (OSError, InvalidRequest) as error:
        log.warning("a bad artifact is not reported", kind=request.kind, key=request.key, error=str(error))


async def tell_proven(
    door: str, uses: Sequence[ArtifactRequest], *, has_answered: Callable[[], bool], prove: Callable[[str, str], bool]
) -> None:
    """Waits until the replica has answered a request, notes that what it used is good, and tells the supervisor.

    Args:
        door: Path of the supervisor's socket; empty: there is nobody to tell.
        uses: What the start used or made.
        has_answered: Whether a request was answered without an error.
        prove: Notes it on the disk, by kind and key, and returns whether it is good; blocks, and raises nothing.
    """
    # A second late is nothing; the ledger of requests wakes nobody, for it is on each token's way.
    while not has_answered():  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_SECONDS)
    for request in uses:
        is_good = await asyncio.to_thread(prove, request.kind, request.key)
        for _ in range(_TELL_TRIES if door and is_good else 0):
            if await _tell(door, request):
                break
            await asyncio.sleep(_TELL_PAUSE_SECONDS)


def _ask(door: str, ask: Ask, request: ArtifactRequest, timeout_seconds: float) -> line_door.Document:
    return line_door.ask(door, encode_request(ask, request), timeout_seconds=timeout_seconds)


async def _tell(door: str, request: ArtifactRequest) -> bool:
    try:
        async with asyncio.timeout(_TELL_SECONDS):
            reader, writer = await asyncio.open_unix_connection(door)
            try:
                writer.write(encode_request(Ask.PROVEN, request))
                await writer.drain()
                return bool(await reader.readline())
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
