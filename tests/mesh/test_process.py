"""Processes: settings, readiness, signals and exit status, on real processes."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

PROGRAM = """
import asyncio
from helios.mesh.process import run
from helios.mesh.settings import ProcessSettings
from helios.mesh.errors import InvalidRequest

class Settings(ProcessSettings):
    process_name = "sample"
    peers: tuple[str, ...] = ()
    count: int = 3

async def tick():
    while True:
        await asyncio.sleep(0.01)

async def main(settings, lifetime):
    if settings.count == 13:
        raise InvalidRequest("thirteen is refused", metadata={"error": "of its own", "event": "13"})
    lifetime.group.create_task(tick(), name="tick")
    lifetime.mark_ready(count=settings.count, peers=list(settings.peers))
    await lifetime.wait_stop()

run("sample", Settings, main)
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "sample.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**dict(os.environ), **variables}  # noqa: TID251 - the environment is what is tested
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=environment)


def test_a_process_becomes_ready_serves_metrics_and_stops_on_sigterm(program: list[str], tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    process = subprocess.Popen([*program, "--mesh.tls=off", "--peers=a:1", "--peers=b:2", f"--ready-file={ready}"])
    try:
        deadline = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        facts = json.loads(ready.read_text())
        assert facts["peers"] == ["a:1", "b:2"]
        for path in ("metrics", "healthz", "readyz"):
            with urllib.request.urlopen(f"http://{facts['ops_address']}/{path}", timeout=5) as response:
                assert response.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(5)


def test_flags_beat_the_environment_which_beats_the_file(program: list[str], tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('count = 1\nlog_level = "error"\nops_listen = "127.0.0.1:1"\n')
    command = [*program, "--settings-file", str(file), "--print-settings", "--log-level=debug"]
    shown = json.loads(run(command, HELIOS_SAMPLE__COUNT="2", HELIOS_SAMPLE__LOG_LEVEL="info").stdout)
    assert (shown["count"], shown["log_level"], shown["ops_listen"]) == (2, "debug", "127.0.0.1:1")


def test_all_wrong_settings_are_listed(program: list[str], tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('cuont = 1\nlog_level = "loud"\n')
    result = run([*program, "--settings-file", str(file)], HELIOS_SAMPLE__COUNT="many")
    assert result.returncode == 2
    assert "cuont" in result.stderr
    assert "log_level" in result.stderr
    assert "count" in result.stderr


def test_an_unknown_flag_stops_the_process(program: list[str]) -> None:
    result = run([*program, "--no-such-flag=1"])
    assert result.returncode == 2
    assert "no-such-flag" in result.stderr


def test_a_failed_start_says_why_in_one_line(program: list[str]) -> None:
    result = run([*program, "--mesh.tls=off", "--count=13"])
    assert result.returncode == 1
    assert "thirteen is refused" in result.stderr
    assert "Traceback" not in result.stderr
    # Whatever an error's values are called, the log has them.
    logged = next(json.loads(line) for line in result.stderr.splitlines() if "process failed" in line)
    assert (logged["error"], logged["metadata"]) == ("thirteen is refused", {"error": "of its own", "event": "13"})


HANGING = """
import asyncio, sys, threading, time
from helios.mesh.process import run
from helios.mesh.settings import ProcessSettings

class Settings(ProcessSettings):
    process_name = "sample"
    kind: str = ""

async def deaf():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

def block():
    time.sleep(60)

async def main(settings, lifetime):
    if settings.kind == "task":
        lifetime.group.create_task(deaf(), name="call /helios.Sample/Hang")
    lifetime.mark_ready()
    await lifetime.wait_stop()
    if settings.kind == "loop":
        block()
    if settings.kind == "thread":
        threading.Thread(target=block).start()
    if settings.kind == "pool":
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, block)], timeout=0.01)

run("sample", Settings, main)
"""


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("task", "call /helios.Sample/Hang: deaf:"),
        ("loop", "in block"),
        ("thread", "in block"),
        ("pool", "in block"),
    ],
)
def test_a_stop_that_hangs_says_what_it_waits_for_and_ends(tmp_path: Path, kind: str, named: str) -> None:
    path, ready = tmp_path / "sample.py", tmp_path / "ready.json"
    path.write_text(HANGING)
    command = [sys.executable, str(path), "--mesh.tls=off", "--ops-listen=", f"--kind={kind}", "--stop-seconds=0.8"]
    process = subprocess.Popen([*command, f"--ready-file={ready}"], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, said = process.communicate(timeout=15)
        assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.wait(5)
    assert process.returncode == 1
    assert named in said
