"""The registry as a process: it starts, says so, stops, and survives kill -9 at any moment of an ingest."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from helios.mesh.errors import HeliosError
from helios.registry.client import IngestDone, IngestProgress, RegistryClient
from helios.registry.ownership import OWNER_FILE
from tests.registry import tiny
from tests.registry.support import Mesh

ROOT = Path(__file__).resolve().parents[2]
# Importing takes a second of a core, which a busy machine has for it now and then.
START_SECONDS = 90


@asynccontextmanager
async def running(
    root: Path, mesh: Mesh, *flags: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Process, str]]:
    """Runs a registry on a directory; yields the process and its address, and stops it at the end."""
    ready = root.with_name(f"{root.name}-ready.json")
    ready.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "helios.registry",
        f"--state-directory={root}",
        f"--mesh.identity-directory={mesh.identity('registry').directory}",
        f"--ready-file={ready}",
        "--ingest.reserve-bytes=0",
        *flags,
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PYTHONPATH": os.pathsep.join(sys.path)} | dict(environment or {}),
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            while not ready.exists():
                assert process.returncode is None, f"the registry ended with {process.returncode}"
                await asyncio.sleep(0.02)
        yield process, json.loads(ready.read_text())["address"]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                await process.wait()


def leftovers(root: Path) -> list[str]:
    files = (path for part in ("blobs", "work") for path in (root / part).rglob("*") if path.is_file())
    return [str(path) for path in files if path.name != OWNER_FILE]


async def ingest(client: RegistryClient, name: str, source: Path) -> IngestDone:
    events = [event async for event in client.ingest(name, str(source))]
    assert isinstance(events[-1], IngestDone)
    return events[-1]


async def follow(client: RegistryClient, source: Path, phase: str, act: Callable[[], Awaitable[None]]) -> None:
    """Ingests and acts at each report of a phase whose size is known."""
    async for event in client.ingest("m", str(source)):
        if isinstance(event, IngestProgress) and event.phase == phase and event.total_bytes:
            await act()


async def test_starts_serves_and_stops(tmp_path: Path, mesh: Mesh, model_directory: Path) -> None:
    root = tmp_path / "registry"
    async with running(root, mesh) as (process, address):
        async with mesh.client(address) as client:
            before = (await ingest(client, "m", model_directory)).model
        loaded = psutil.Process(process.pid).memory_maps()
        assert not any("torch" in mapped.path for mapped in loaded)
    assert process.returncode == 0
    async with running(root, mesh) as (_, address), mesh.client(address) as client:
        assert await client.list_models() == (before,)


async def test_a_second_registry_on_the_same_directory_is_refused(tmp_path: Path, mesh: Mesh) -> None:
    async with running(tmp_path / "registry", mesh):
        with pytest.raises(AssertionError, match="ended with 1"):
            async with running(tmp_path / "registry", mesh):
                pass


@pytest.mark.parametrize("delay_seconds", [0.0, 0.15])
async def test_kill_9_in_the_middle_of_storing(tmp_path: Path, mesh: Mesh, delay_seconds: float) -> None:
    root = tmp_path / "registry"
    directory = tiny.write_big(tmp_path / "big", 256 << 20)
    small = tiny.write_model(tmp_path / "small")
    async with running(root, mesh) as (process, address), mesh.client(address) as client:
        kept = (await ingest(client, "kept", small)).model

        async def kill() -> None:
            await asyncio.sleep(delay_seconds)
            process.kill()
            await process.wait()

        with pytest.raises(HeliosError):
            await follow(client, directory, "store", kill)
    # What the model that was there before needs, and nothing else.
    async with running(root, mesh) as (_, address), mesh.client(address) as client:
        assert await client.list_models() == (kept,)
        manifest = (await client.get_manifest(kept.revision.digest)).manifest
        assert {Path(path).name for path in leftovers(root)} == {entry.digest.hash for entry in manifest.entries}
        assert (await ingest(client, "m", directory)).model.name == "m"
        assert await client.delete_model("m") > 0
        assert {Path(path).name for path in leftovers(root)} == {entry.digest.hash for entry in manifest.entries}


async def test_kill_9_in_the_middle_of_a_conversion_takes_the_converter_along(
    tmp_path: Path, mesh: Mesh, gguf_file: Path
) -> None:
    root = tmp_path / "registry"
    async with running(root, mesh) as (process, address), mesh.client(address) as client:
        converters: list[psutil.Process] = []

        async def kill() -> None:
            # Forecasts are made by another process, which gets the processors' spare time only, and so ends late.
            children = psutil.Process(process.pid).children(recursive=True)
            converters.extend(child for child in children if "helios.registry.convert" in child.cmdline())
            process.kill()
            await process.wait()

        with pytest.raises(HeliosError):
            await follow(client, gguf_file, "convert", kill)
    assert converters
    async with asyncio.timeout(30):
        while any(_is_alive(child) for child in converters):
            await asyncio.sleep(0.05)
    async with running(root, mesh) as (_, address), mesh.client(address) as client:
        assert await client.list_models() == ()
        assert leftovers(root) == []


async def test_sigterm_in_the_middle_of_a_conversion_stops_at_once_and_leaves_nothing(
    tmp_path: Path, mesh: Mesh, gguf_file: Path
) -> None:
    root = tmp_path / "registry"
    async with running(root, mesh) as (process, address), mesh.client(address) as client:

        async def terminate() -> None:
            process.terminate()

        with pytest.raises(HeliosError):
            await follow(client, gguf_file, "convert", terminate)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    assert leftovers(root) == []


async def test_a_store_of_another_database_is_refused_and_taken_over_by_its_name(tmp_path: Path, mesh: Mesh) -> None:
    blobs = tmp_path / "blobs"
    place = f"--blob-store.url={blobs}"
    async with running(tmp_path / "one", mesh, place):
        pass
    with pytest.raises(AssertionError, match="the registry ended with"):
        async with running(tmp_path / "two", mesh, place):
            pass
    owner = json.loads((blobs / OWNER_FILE).read_text())["database"]
    # Whoever restarts it leaves the flag there.
    for _ in range(2):
        async with running(tmp_path / "two", mesh, place, f"--blob-store.take-over-from={owner}"):
            pass
    assert json.loads((blobs / OWNER_FILE).read_text())["database"] != owner


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs. Where a test before has made this process adopt orphans, they stay as zombies."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
