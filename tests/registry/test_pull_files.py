"""Which files of a repository a pull takes, and how many at a time."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from helios.registry.downloads import DownloadSession
from helios.registry.sources.remote import RemoteFile, Repository
from helios.registry.sources.settings import DownloadSettings
from tests.registry import tiny
from tests.registry.test_pull import Place, open_place


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with open_place(tmp_path) as opened:
        yield opened


async def test_the_same_weights_in_another_layout_are_not_fetched(place: Place) -> None:
    weights = place.weights
    doubled = place.files | {
        "consolidated.safetensors": weights[:-1] + b"x",
        "original/consolidated.00.pth": b"p" * 100,
        "original/params.json": b"{}",
        "model.fp16.safetensors": weights[:-1] + b"y",
    }
    place.hub.repository("org/doubled", doubled)
    done = await place.parts.ingest("m", "hf:org/doubled")
    assert {path for path in await place.stored(done.model.revision.digest) if path.endswith(".safetensors")} == {
        "model.safetensors"
    }
    assert {path for _, path, _ in place.hub.bytes_requests()} == {f"/cdn/{hashlib.sha256(weights).hexdigest()}"}


async def test_shards_are_fetched_several_at_a_time_the_smallest_first(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.write_sharded(place.root / "shards", 6)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    place.hub.repository("org/shards", files)
    # Nobody passes alone: one after the other, the first would wait for ever.
    gate, begun, running = asyncio.Barrier(2), list[int](), list[int]()
    fetch = DownloadSession.fetch

    async def meet(
        session: DownloadSession, file: RemoteFile, repository: Repository, on_bytes: Callable[[int], None]
    ) -> tuple[Path | None, str]:
        begun.append(file.size_bytes)
        running.append(running[-1] + 1 if running else 1)
        await gate.wait()
        try:
            return await fetch(session, file, repository, on_bytes)
        finally:
            running.append(running[-1] - 1)

    monkeypatch.setattr(DownloadSession, "fetch", meet)
    async with asyncio.timeout(60):
        done = await place.parts.ingest("m", "hf:org/shards")
    assert await place.stored(done.model.revision.digest) == files
    assert len(begun) == 6
    assert begun == sorted(begun)
    assert max(running) <= DownloadSettings().files
