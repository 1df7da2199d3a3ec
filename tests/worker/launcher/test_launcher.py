"""LauncherClient and the launcher process, with the simulated engine."""

import asyncio
import os
import signal
import time
from pathlib import Path

import grpc.aio
import psutil
import pytest

from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.api.inference.v1 import inference_service_pb2_grpc
from helios.api.worker.v1 import supervisor_service_pb2 as worker_pb
from helios.mesh.errors import DeadlineExceeded, PreconditionFailed
from helios.worker.launcher.client import ForkedReplica, LauncherClient
from helios.worker.launcher.zygote import read_start_ticks
from helios.worker.replica.spec import ReplicaSpec
from tests.worker.replica.support import MODEL, Leaves, RecordingSupervisor, make_spec, source_path, wait_gone


@pytest.fixture
def leaves(tmp_path: Path) -> Leaves:
    return Leaves.issue(tmp_path / "pki")


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", source_path())


def deadline(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


async def complete(leaves: Leaves, spec: ReplicaSpec, text: str, max_tokens: int = 3) -> str:
    async with leaves.dial(f"{spec.host}:{spec.port}") as dialer:
        stub = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)
        request = pb.CompleteRequest(model=MODEL, text=text, sampling=pb.SamplingParameters(max_tokens=max_tokens))
        return "".join(
            [response.delta.text async for response in stub.Complete(request, timeout=10, wait_for_ready=True)]
        )


async def test_a_forked_replica_answers_and_its_exit_is_told(tmp_path: Path, leaves: Leaves) -> None:
    spec = make_spec(tmp_path, leaves, supervisor_address="")
    async with LauncherClient(engine="simulated") as launcher:
        replica = await launcher.fork(spec, deadline())
        process = psutil.Process(replica.pid)
        assert read_start_ticks(replica.pid) == replica.start_ticks
        assert process.ppid() == launcher.pid
        # The child makes its own session as its first step; the launcher tells of it without waiting for that.
        async with asyncio.timeout(20):
            while os.getsid(replica.pid) != replica.pid:
                await asyncio.sleep(0.01)
        assert await complete(leaves, spec, "one two") == "one two one "
        os.kill(replica.pid, signal.SIGTERM)
        async with asyncio.timeout(10):
            ended = await launcher.exits.get()
    assert (ended.pid, ended.start_ticks, ended.status) == (replica.pid, replica.start_ticks, 0)
    assert "replica ready" in Path(spec.log_path).read_text()


async def test_the_launcher_has_one_thread_and_its_children_hold_nothing_of_it(tmp_path: Path, leaves: Leaves) -> None:
    first = make_spec(tmp_path, leaves, supervisor_address="")
    (tmp_path / "second").mkdir()
    second = make_spec(tmp_path / "second", leaves, supervisor_address="")
    async with LauncherClient(engine="simulated") as launcher:
        one = await launcher.fork(first, deadline())
        assert launcher.pid is not None
        assert psutil.Process(launcher.pid).num_threads() == 1
        two = await launcher.fork(second, deadline())
        await complete(leaves, second, "ready")
        # Whether a hub lets anybody in is nothing to a model that is here.
        assert b"\0HF_HUB_OFFLINE=1\0" in Path(f"/proc/{one.pid}/environ").read_bytes()
        # A copy of the control socket in a replica would hide the launcher's end from the supervisor.
        sockets = {
            fd.readlink().name for fd in Path(f"/proc/{launcher.pid}/fd").iterdir() if "socket:" in str(fd.readlink())
        }
        held = {fd.readlink().name for fd in Path(f"/proc/{two.pid}/fd").iterdir()}
        assert sockets
        assert not sockets & held
        for replica in (one, two):
            os.kill(replica.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            ended = {(await launcher.exits.get()).pid, (await launcher.exits.get()).pid}
        assert ended == {one.pid, two.pid}


async def test_a_launcher_that_dies_is_replaced_and_its_replicas_live_on(tmp_path: Path, leaves: Leaves) -> None:
    spec = make_spec(tmp_path, leaves, supervisor_address="")
    async with LauncherClient(engine="simulated") as launcher:
        replica = await launcher.fork(spec, deadline())
        await complete(leaves, spec, "up")
        killed = launcher.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        assert await complete(leaves, spec, "still here") == "still here still "
        (tmp_path / "next").mkdir()
        other = make_spec(tmp_path / "next", leaves, supervisor_address="")
        async with asyncio.timeout(30):
            while launcher.pid in {None, killed}:
                await asyncio.sleep(0.01)
        following = await launcher.fork(other, deadline())
        assert await complete(leaves, other, "new") == "new new new "
        end(replica, following)


async def test_when_a_launcher_dies_another_of_its_pool_forks_at_once(tmp_path: Path, leaves: Leaves) -> None:
    specs = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        specs.append(make_spec(tmp_path / name, leaves, supervisor_address=""))
    async with LauncherClient(engine="simulated", pool_size=2) as launcher:
        first = await launcher.fork(specs[0], deadline())
        active = launcher.pid
        assert active is not None
        (standby,) = {child.pid for child in psutil.Process(active).children()} - {first.pid}
        assert psutil.Process(standby).num_threads() == 1
        os.kill(active, signal.SIGKILL)
        async with asyncio.timeout(5):
            while launcher.pid != standby:
                await asyncio.sleep(0.005)
        assert launcher.is_ready
        second = await launcher.fork(specs[1], deadline())
        assert psutil.Process(second.pid).ppid() == standby
        assert await complete(leaves, specs[0], "one") == "one one one "
        async with asyncio.timeout(60):
            while launcher.pid == standby:
                await asyncio.sleep(0.01)
        third = await launcher.fork(specs[2], deadline())
        assert psutil.Process(third.pid).ppid() not in {active, standby}
        assert wait_gone([psutil.Process(standby)] if psutil.pid_exists(standby) else [], 10) == []
        assert await complete(leaves, specs[1], "two") == "two two two "
        end(first, second, third)


async def test_leaving_the_client_ends_the_launcher_and_no_replica(tmp_path: Path, leaves: Leaves) -> None:
    spec = make_spec(tmp_path, leaves, supervisor_address="")
    async with LauncherClient(engine="simulated") as launcher:
        replica = await launcher.fork(spec, deadline())
        await complete(leaves, spec, "up")
        pid = launcher.pid
    assert not psutil.pid_exists(pid or 0)
    assert await complete(leaves, spec, "alone") == "alone alone alone "
    end(replica)


async def test_a_fork_that_can_not_be_is_an_error(tmp_path: Path, leaves: Leaves) -> None:
    spec = make_spec(tmp_path, leaves)
    async with LauncherClient(engine="simulated") as launcher:
        with pytest.raises(DeadlineExceeded):
            await launcher.fork(spec, time.monotonic())
        await launcher.wait_ready()
        broken = make_spec(tmp_path, leaves, placement=None)
        with pytest.raises((PreconditionFailed, AttributeError, TypeError)):
            await launcher.fork(broken, deadline())


async def test_an_engine_that_fails_is_told_to_the_supervisor(tmp_path: Path, leaves: Leaves) -> None:
    spec = make_spec(tmp_path, leaves, engine="no-such-engine")
    async with (
        RecordingSupervisor(spec.supervisor_address, leaves.files("worker")) as supervisor,
        LauncherClient(engine="simulated") as launcher,
    ):
        replica = await launcher.fork(spec, deadline())
        said = await supervisor.wait_heard(
            lambda said: said.HasField("failed") or said.hello.replica.HasField("failure")
        )
        failure = said.failed if said.HasField("failed") else said.hello.replica.failure
        async with asyncio.timeout(10):
            ended = await launcher.exits.get()
    assert failure.reason == "UNKNOWN_ENGINE"
    assert "no-such-engine" in failure.message
    assert (ended.pid, ended.status) == (replica.pid, 1)


async def test_a_replica_outlives_its_supervisor_and_says_hello_to_the_next(tmp_path: Path, leaves: Leaves) -> None:
    spec = make_spec(tmp_path, leaves)
    async with LauncherClient(engine="simulated") as launcher:
        replica = await launcher.fork(spec, deadline())
        async with RecordingSupervisor(spec.supervisor_address, leaves.files("worker")) as first:
            await first.wait_heard(lambda said: said.HasField("ready") or said.hello.replica.state == 5)
        await complete(leaves, spec, "while it is away")
        async with RecordingSupervisor(spec.supervisor_address, leaves.files("worker")) as second:
            hello = (await second.wait_heard(lambda said: said.HasField("hello"))).hello
            assert (hello.replica.pid, hello.replica.state) == (replica.pid, 5)
            assert hello.replica.load.generated_tokens == 3
            # What happened in between is told.
            finished = (await second.wait_heard(lambda said: said.load.finished)).load.finished[0]
            started = await second.wait_heard(lambda said: said.load.started)
            assert started.load.started[0].request_id == finished.request_id
            second.say(worker_pb.AttachResponse(stop=worker_pb.ReplicaStop()))
            async with asyncio.timeout(10):
                assert (await launcher.exits.get()).status == 0


async def test_an_orphan_drains_and_ends(tmp_path: Path, leaves: Leaves) -> None:
    spec = make_spec(tmp_path, leaves, orphan_seconds=0.3)
    async with LauncherClient(engine="simulated") as launcher:
        started = time.monotonic()
        await launcher.fork(spec, deadline())
        async with asyncio.timeout(15):
            assert (await launcher.exits.get()).status == 0
    assert time.monotonic() - started > 0.3
    assert "orphaned" in Path(spec.log_path).read_text()


async def test_a_drain_that_takes_too_long_cuts_off(tmp_path: Path, leaves: Leaves) -> None:
    spec = make_spec(tmp_path, leaves, supervisor_address="", drain_seconds=0.3)
    async with LauncherClient(engine="simulated") as launcher:
        replica = await launcher.fork(spec, deadline())
        async with leaves.dial(f"{spec.host}:{spec.port}") as dialer:
            stub = dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)
            sampling = pb.SamplingParameters(max_tokens=4000)
            call = stub.Complete(
                pb.CompleteRequest(model=MODEL, text="long", sampling=sampling), timeout=60, wait_for_ready=True
            )
            await call.read()
            os.kill(replica.pid, signal.SIGTERM)
            async with asyncio.timeout(10):
                assert (await launcher.exits.get()).status == 0
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in call:
                    pass


def end(*replicas: ForkedReplica) -> None:
    for replica in replicas:
        process = psutil.Process(replica.pid)
        process.kill()
        assert wait_gone([process], 5) == []
