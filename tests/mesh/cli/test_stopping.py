"""The end of `helios up`: signals that ask for it, processes that don't want to end, and nothing left behind."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from helios.cli import topology
from helios.cli.state import StateDirectory

WAITING = """
import asyncio
from helios.cli.up import stop_on_signals

async def main():
    stop = stop_on_signals()
    print("ready", flush=True)
    await stop.wait()

asyncio.run(main())
"""

# A worker that is deaf to SIGTERM, with a replica in a session of its own; the other processes do as they are told.
WORKER = """
import json, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
replica = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
Path(sys.argv[1]).write_text(json.dumps({"ready": True, "replica": replica.pid, "on_stop": sys.argv[2]}))
time.sleep(60)
"""
MESH = """
import asyncio, sys
from pathlib import Path
from helios.cli.certificates import issue_due
from helios.cli.children import Child, ChildSpec, become_subreaper
from helios.cli.state import StateDirectory
from helios.cli.up import Mesh, UpOptions, stop_on_signals

async def main():
    worker, root, on_stop = sys.argv[1:]
    become_subreaper()
    state = StateDirectory(Path(root))
    state.create()
    issue_due(state)
    mesh = Mesh(UpOptions(state, model=""), lambda _: None)
    for index, child in enumerate(mesh.children):
        name, command, ready = child.spec.name, [sys.executable, "-c", "import time; time.sleep(60)"], None
        if name == "worker":
            ready = child.spec.ready_path
            command = [sys.executable, "-c", worker, str(ready), on_stop]
        spec = ChildSpec(name, command, child.spec.log_path, ready_path=ready, stop_seconds=0.5)
        mesh.children[index] = Child(spec, lambda: None)
    await mesh.run(stop_on_signals(), lambda: print("ready", flush=True))

asyncio.run(main())
"""


@contextmanager
def running(script: str, *arguments: str, ignored: signal.Signals | None = None) -> Iterator[subprocess.Popen[str]]:
    """Runs a script until its first line; it inherits that a signal is ignored, as it would from a shell."""
    previous = signal.signal(ignored, signal.SIG_IGN) if ignored is not None else None
    try:
        command = [sys.executable, "-c", script, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        if ignored is not None:
            signal.signal(ignored, previous)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("ignored", [None, signal.SIGINT])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_sends_a_signal_that_asks_for_the_end_gets_it(
    number: signal.Signals, ignored: signal.Signals | None
) -> None:
    """A shell without job control has SIGINT ignored for what a script starts with ``&``."""
    with running(WAITING, ignored=ignored) as process:
        process.send_signal(number)
        assert process.wait(10) == 0


def test_a_mesh_under_nohup_outlives_its_terminal() -> None:
    with running(WAITING, ignored=signal.SIGHUP) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def replica_of(state: Path) -> psutil.Process:
    """Returns the process that the worker has started."""
    return psutil.Process(json.loads((state / "run" / "worker.ready.json").read_text())["replica"])


def test_a_worker_that_hangs_is_named_and_killed_and_its_replicas_with_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(MESH, WORKER, str(state), "drain") as process:
        replica = replica_of(state)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=15)
    assert process.returncode == 0
    [said] = [line for line in output.splitlines() if "did not end by itself" in line]
    assert "worker" in said
    assert "-9" in said
    assert str(replica.pid) in next(line for line in output.splitlines() if "were killed" in line)
    assert not replica.is_running()


def test_replicas_that_are_to_be_left_are_left(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(MESH, WORKER, str(state), "leave") as process:
        replica = replica_of(state)
        try:
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
            assert replica.status() != psutil.STATUS_ZOMBIE
        finally:
            replica.kill()


async def test_an_envoy_that_does_not_answer_holds_up_no_stop(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.create()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(silent, state.sockets / "envoy-admin.sock")
    try:
        began = time.monotonic()
        async with asyncio.timeout(10):
            await topology.drain_envoy(state, began + 0.4)
        assert time.monotonic() - began < 2
    finally:
        server.close()
