"""`python -m helios.proxy` as its parent sees it: ready file, exit status, wrong settings, a crash."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from helios.mesh.settings import to_arguments
from tests.proxy.fakes import FakeWorker, until
from tests.proxy.harness import Proxy, World


@asynccontextmanager
async def running_process(world: World) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """Runs the process for the block; kills it by its handle where it is still there."""
    settings = {
        "state_directory": world.directory / "proxy",
        "registry_target": world.registry_target,
        "picker_listen": f"unix:{world.directory}/picker.sock",
        "control_listen": f"unix:{world.directory}/control.sock",
        "mesh": {"identity_directory": world.identity("proxy").directory},
    }
    ready = world.directory / "ready.json"
    ready.unlink(missing_ok=True)
    arguments = ["-m", "helios.proxy", f"--ready-file={ready}", *to_arguments(settings)]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=-3, stderr=-3)
    try:
        await until(lambda: ready.exists() or process.returncode is not None, seconds=30)
        yield process, json.loads(ready.read_text())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_it_stops_at_once_though_sessions_are_open(world: World) -> None:
    world.registry.put("m")
    async with world.running_registry(), running_process(world) as (process, facts):
        proxy = Proxy(facts["picker_address"], facts["control_address"])
        async with world.envoy(proxy) as envoy, world.worker(proxy):
            assert (await envoy.ask("m")).endpoint
            async with httpx.AsyncClient(trust_env=False) as client:
                metrics = (await client.get(f"http://{facts['ops_address']}/metrics")).text
                assert (await client.get(f"http://{facts['ops_address']}/readyz")).status_code == 200
            assert 'helios_picks_total{outcome="released"} 1.0' in metrics
            begin = time.monotonic()
            process.terminate()
            async with asyncio.timeout(4):
                assert await process.wait() == 0
            assert time.monotonic() - begin < 3


async def test_killed_and_started_again_it_goes_on(world: World) -> None:
    world.registry.put("m")
    worker = FakeWorker()
    async with world.running_registry():
        async with running_process(world) as (process, facts):
            proxy = Proxy(facts["picker_address"], facts["control_address"])
            async with world.envoy(proxy) as envoy, world.worker(proxy, worker):
                first = await envoy.ask("m")
                await until((world.directory / "proxy" / "workers.json").exists)
                process.kill()
                await process.wait()
        async with (
            running_process(world),
            world.envoy(proxy) as envoy,
            world.worker(proxy, worker),
        ):
            assert (await envoy.ask("m")).endpoint == first.endpoint
    assert len(worker.starts) == 1


async def test_wrong_settings_are_all_named(world: World) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "helios.proxy",
        "--hold.limit-seconds=-1",
        "--breaker.failure-count=0",
        stdout=-1,
        stderr=-2,
    )
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    assert process.returncode == 2
    assert "hold.limit_seconds" in output.decode()
    assert "breaker.failure_count" in output.decode()
