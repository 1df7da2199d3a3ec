"""What all tests share: the leak check, seeded hypothesis, folder markers, and the embedded model.

The leak check fails a test that leaves something behind: asyncio tasks, threads, descriptors, child processes. It gives
everything a few seconds to go, because closing is asynchronous in places (gRPC's sockets, a child's exit). Things
that exist before the test starts, so all that fixtures of a wider scope own, are not its concern; a test that means to
leave something says so with `@pytest.mark.leaks(reason)`.
"""

import asyncio
import fcntl
import gc
import inspect
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc.aio
import hypothesis
import psutil
import pytest

from helios.registry.sources.embedded import EMBEDDED, find_embedded
from tests.emulators.fixtures import azurite_bucket, azurite_server, seaweedfs_bucket, seaweedfs_server

__all__ = ["azurite_bucket", "azurite_server", "seaweedfs_bucket", "seaweedfs_server"]

ROOT = Path(__file__).resolve().parent.parent
MODEL_DIRECTORY = ROOT / "build" / "models" / "smollm2-135m-instruct"
# Whole files of tests that start processes or servers for each test, or move large bodies, 3 to 25 s each: `make check`
# leaves them out, so that it stays below its 90 s.
SLOW_FILES = (
    "mesh/cli/test_stopping.py",
    "mesh/http2/test_bad_peers.py",
    "mesh/http2/test_contract.py",
    "mesh/test_process.py",
    "mesh/test_server.py",
    "mesh/transfer/test_engine.py",
    "proxy/test_explain_process.py",
    "proxy/test_express_gateway.py",
    "proxy/test_gateway.py",
    "proxy/test_keys_gateway.py",
    "proxy/test_main.py",
    "proxy/test_peers_process.py",
    "proxy/test_process.py",
    "proxy/test_sent_along.py",
    "proxy/test_usage_process.py",
    "registry/test_convert.py",
    "registry/test_database.py",
    "registry/test_follow.py",
    "registry/test_follow_races.py",
    "registry/test_ingest.py",
    "registry/test_prefetch_process.py",
    "registry/test_process.py",
    "registry/test_profiles.py",
    "registry/test_pull.py",
    "registry/test_pull_faults.py",
    "registry/test_pull_files.py",
    "registry/test_pull_places.py",
    "registry/test_push.py",
    "simulator/test_core.py",
    "simulator/test_study.py",
    "storage/sync/test_session.py",
    "storage/sync/test_swarm_process.py",
    "storage/sync/test_swarms.py",
    "storage/test_agent_process.py",
    "storage/test_kill.py",
    "storage/test_memory_process.py",
    "storage/test_power_cut.py",
    "storage/test_service.py",
    "wire/test_admin.py",
    "wire/test_changes.py",
    "wire/test_endurance.py",
    "wire/test_express.py",
    "wire/test_grpc.py",
    "wire/test_large_bodies.py",
    "wire/test_proxies.py",
    "wire/test_request_id.py",
    "wire/test_rest.py",
    "wire/test_strip.py",
    "worker/artifacts/test_keeper.py",
    "worker/artifacts/test_packed_artifacts.py",
    "worker/early/test_starts.py",
    "worker/engines/test_compat.py",
    "worker/engines/test_engines.py",
    "worker/launcher/test_launcher.py",
    "worker/launcher/test_launchers.py",
    "worker/supervisor/test_staging.py",
    "worker/supervisor/test_supervisor.py",
    "worker/supervisor/test_worker_process.py",
)
# A child that was sent SIGTERM may flush and fsync; sockets of gRPC are closed by its own threads.
GRACE_SECONDS = 8.0
# Started once in a process and kept for good: gRPC's poller, and the worker threads of hypothesis and OpenTelemetry.
LASTING_THREADS = ("_poll_wrapper", "OtelBatch", "pytest_timeout")


def pytest_configure(config: pytest.Config) -> None:
    """Seeds hypothesis: the same examples in every run."""
    hypothesis.settings.register_profile("short", derandomize=True, deadline=None, max_examples=60)
    hypothesis.settings.load_profile("short")
    # gRPC's poller has a pair of sockets for as long as anybody uses it: made here, they are nobody's leak.
    grpc.aio.init_grpc_aio()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves files alone of which ``-m`` wants nothing: importing some brings torch, seconds of each process."""
    expression = config.option.markexpr
    unwanted = set() if " or " in expression else set(re.findall(r"\bnot (\w+)", expression))
    return True if unwanted & set(_marks_of(collection_path)) else None


def pytest_collection_finish() -> None:
    """Keeps the garbage collector off what imports made, which lasts: the leak check collects after many tests."""
    gc.collect()
    gc.freeze()


# First, because pytest deselects by marker in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks files by where they are and what they are called; asynchronous tests get the check for leaked tasks."""
    for item in items:
        for mark in _marks_of(item.path):
            item.add_marker(mark)
        # Of the heavy ones, one of each kind runs at a time: scenarios share a mesh, and wait much of their time.
        for kind in ("scenario", "real_model"):
            if item.get_closest_marker(kind) is not None:
                item.add_marker(pytest.mark.xdist_group(kind))
                break
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(inspect.unwrap(item.obj)):
            item.fixturenames.insert(_wider_scope_count(item), "leaves_no_task")


def _marks_of(path: Path) -> Iterator[str]:
    """Yields the marks that all tests of a file or folder have."""
    if path.is_relative_to(ROOT / "tests" / "scenarios"):
        yield "scenario"
    if path.name.endswith("_real.py"):
        yield "real_model"
    if path.is_relative_to(ROOT / "tests") and str(path.relative_to(ROOT / "tests")) in SLOW_FILES:
        yield "slow"


def _wider_scope_count(item: pytest.Function) -> int:
    """Returns how many fixtures are set up before those of the test alone; they are sorted by scope."""
    definitions = item._fixtureinfo.name2fixturedefs
    scopes = [definitions[name][-1].scope if name in definitions else "function" for name in item.fixturenames]
    return next((index for index, scope in enumerate(scopes) if scope == "function"), len(scopes))


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test if threads, descriptors or child processes are left that were not there before it."""
    checks: list[tuple[Callable[[], set[str]], set[str]]] = []
    if request.node.get_closest_marker("leaks") is None:
        finders = [_children]
        # A scenario's clients, of wider scope, connect again after it has killed what they were connected to.
        if request.node.get_closest_marker("scenario") is None:
            finders += [_threads, _descriptors]
        checks = [(finder, finder()) for finder in finders]
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while left := {thing for finder, before in checks for thing in finder() - before}:
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {', '.join(sorted(left))}", pytrace=False)
        gc.collect()
        time.sleep(0.02)


@pytest.fixture
async def leaves_no_task(leaves_nothing: None) -> AsyncIterator[None]:
    """Fails the test if tasks are left; set up first, so that it looks after all other fixtures have closed.

    It depends on the other check, so that threads of the loop's executor end with the loop before they are looked for.
    """
    before = asyncio.all_tasks()
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {', '.join(sorted(map(repr, left)))}", pytrace=False)
        await asyncio.sleep(0.02)


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """The embedded model as safetensors."""
    return embedded_model()


def embedded_model() -> Path:
    """Returns the embedded model as safetensors; converted once for all, because the same package gives the same files.

    Whoever asks while another converts it waits.
    """
    MODEL_DIRECTORY.parent.mkdir(parents=True, exist_ok=True)
    with (MODEL_DIRECTORY.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # runs of pytest may start together
        if not MODEL_DIRECTORY.exists():
            _convert(find_embedded(EMBEDDED["smollm2-135m-instruct"]), MODEL_DIRECTORY)
    return MODEL_DIRECTORY


def _convert(gguf: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch, target.name)
        fresh.mkdir()
        command = [sys.executable, "-m", "helios.registry.convert", str(gguf), str(fresh)]
        # Standard input is the converter's lifeline: it has to stay open until it is done.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stdout is not None
            reports = process.stdout.read()
            status = process.wait(timeout=240)
        assert status == 0, reports
        fresh.rename(target)


def _threads() -> set[str]:
    names = {thread.name for thread in threading.enumerate()}
    return {f"thread {name}" for name in names if not any(lasting in name for lasting in LASTING_THREADS)}


def _descriptors() -> set[str]:
    """Names open files, pipes and sockets; anonymous inodes (epoll, eventfd) belong to loops and to gRPC's engine."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        if not target.startswith(("anon_inode:", "/dev/", "/proc/")):
            found.add(f"descriptor {target}")
    return found


def _children() -> set[str]:
    if not _may_have_children():
        return set()
    return {name for child in psutil.Process().children() if (name := _living(child))}


def _may_have_children() -> bool:
    """Asks the kernel; psutil reads the entry of every process of the machine, milliseconds before and after a test."""
    try:
        return any((task / "children").read_bytes() for task in Path("/proc/self/task").iterdir())
    except OSError:  # a thread has just ended, or the kernel has no such file
        return True


def _living(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} {process.name()}" if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""
