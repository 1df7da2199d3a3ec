"""What servicers and clients may rely on, whichever transport carries the calls: real grpc.aio clients, real mTLS."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from helios.mesh import errors
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority
from helios.mesh.server import HEALTH_SERVICE, MeshServer, ServerOptions
from helios.mesh.status import OPENAI_ERROR_TRAILER, error_from_rpc
from tests.mesh.http2.echo import SERVICE, Echo

MEBIBYTE = 1 << 20
GRPCURL = str(Path(sys.executable).with_name("grpcurl"))
Method = Callable[..., Any]


@pytest.fixture(params=["grpc", "http2"])
def transport(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def listen(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/server.sock"


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def server(
    echo: Echo, authority: CertificateAuthority, tmp_path: Path, transport: Any, listen: str
) -> AsyncIterator[MeshServer]:
    made = MeshServer(
        listen=listen,
        identity=authority.issue("worker", tmp_path / "worker"),
        policy={SERVICE: frozenset({"edge"})},
        options=ServerOptions(drain_seconds=0.0, transport=transport),
    )
    echo.add_to(made)
    made.serve(SERVICE)
    async with made:
        yield made


@pytest.fixture
async def edge(server: MeshServer, authority: CertificateAuthority, tmp_path: Path) -> AsyncIterator[Dialer]:
    identity = authority.issue("edge", tmp_path / "edge")
    async with Dialer(server.address, identity=identity, peer="worker") as dialer:
        yield dialer


def unary(dialer: Dialer, name: str) -> Method:
    def make(channel: grpc.aio.Channel) -> Any:
        return channel.unary_unary(f"/{SERVICE}/{name}")

    return dialer.stub(make)  # type: ignore[no-any-return]


def stream(dialer: Dialer, path: str) -> Method:
    def make(channel: grpc.aio.Channel) -> Any:
        return channel.unary_stream(path if path[0] == "/" else f"/{SERVICE}/{path}")

    return dialer.stub(make)  # type: ignore[no-any-return]


def both(dialer: Dialer, name: str) -> Method:
    def make(channel: grpc.aio.Channel) -> Any:
        return channel.stream_stream(f"/{SERVICE}/{name}")

    return dialer.stub(make)  # type: ignore[no-any-return]


def total(dialer: Dialer) -> Method:
    def make(channel: grpc.aio.Channel) -> Any:
        return channel.stream_unary(f"/{SERVICE}/Sum")

    return dialer.stub(make)  # type: ignore[no-any-return]


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def drained(call: Any) -> list[bytes]:
    return [message async for message in call]


async def test_a_unary_call(edge: Dialer) -> None:
    assert await unary(edge, "Unary")(b"hello", timeout=5) == b"hello"
    assert await unary(edge, "Unary")(b"", timeout=5) == b""


async def test_metadata_goes_both_ways_text_and_binary(edge: Dialer) -> None:
    sent = (("x-text", "a, b;c=d"), ("x-raw-bin", bytes(range(256))), ("x-twice", "1"), ("x-twice", "2"))
    call = unary(edge, "Unary")(b"", timeout=5, metadata=sent)
    await call
    initial = [tuple(entry) for entry in await call.initial_metadata() or ()]
    trailing = [tuple(entry) for entry in await call.trailing_metadata() or ()]
    for key, value in sent:
        assert (f"initial-{key}", value) in initial
        assert (f"trailing-{key}", value) in trailing


async def test_large_messages_pass_both_ways(edge: Dialer) -> None:
    body = bytes(range(256)) * (32 * MEBIBYTE // 256)
    assert await unary(edge, "Unary")(body, timeout=60) == body


async def test_a_message_above_the_limit_is_refused(
    server: MeshServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    identity = authority.issue("edge", tmp_path / "edge")
    pem = identity.read()
    # A client of ours would not send it.
    options = (("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", "worker.helios.internal"))
    credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
    async with grpc.aio.secure_channel(server.address, credentials, options=options) as channel:
        method: Method = channel.unary_unary(f"/{SERVICE}/Unary")
        error = await failure(method(bytes(34 * MEBIBYTE), timeout=30))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await method(b"the connection is well", timeout=5) == b"the connection is well"


async def test_an_answer_above_the_limit_ends_its_call_alone(edge: Dialer) -> None:
    error = await failure(unary(edge, "Size")(b"%d" % (34 * MEBIBYTE), timeout=30))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(await unary(edge, "Size")(b"10", timeout=5)) == 10


@pytest.mark.parametrize("transport", ["http2"])
async def test_an_answer_that_is_no_message_is_a_bug_of_its_call(edge: Dialer) -> None:
    error = await failure(unary(edge, "Size")(b"-1", timeout=5))
    assert type(error_from_rpc(error)) is errors.Bug
    # What HTTP callers get.
    assert OPENAI_ERROR_TRAILER in [key for key, _ in error.trailing_metadata() or ()]
    assert len(await unary(edge, "Size")(b"10", timeout=5)) == 10


async def test_both_styles_of_streaming_handlers(edge: Dialer) -> None:
    written = await drained(stream(edge, "Write")(b"200 10", timeout=20))
    assert [int.from_bytes(message[:4], "big") for message in written] == list(range(200))
    assert await drained(stream(edge, "Yield")(b"200", timeout=20)) == [b"%d" % number for number in range(200)]


async def test_messages_of_all_sizes_arrive_whole_and_in_order(edge: Dialer) -> None:
    for size in (0, 16379 - 4, 16380 - 4, 65535, 300_000):
        written = await drained(stream(edge, "Write")(f"5 {size}".encode(), timeout=20))
        assert [(int.from_bytes(message[:4], "big"), len(message)) for message in written] == [
            (number, size + 4) for number in range(5)
        ]


async def test_a_client_stream_is_read_to_its_end(edge: Dialer) -> None:
    async def requests() -> AsyncIterator[bytes]:
        for size in range(100):
            yield bytes(size)

    assert await total(edge)(requests(), timeout=10) == b"4950"


async def test_a_conversation(edge: Dialer) -> None:
    call = both(edge, "Both")(timeout=10)
    for number in range(50):
        await call.write(b"%d" % number)
        assert await call.read() == b"%d" % number
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_hundred_streams_at_once_share_a_connection(edge: Dialer) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(drained(stream(edge, "Write")(b"20 5000", timeout=60)), name=f"stream {number}")
            for number in range(100)
        ]
    assert all(len(task.result()) == 20 for task in tasks)


async def test_a_raised_error_keeps_its_details(edge: Dialer) -> None:
    error = await failure(unary(edge, "Fail")("ümlaut, 100 %\nnew line".encode(), timeout=5))
    arrived = error_from_rpc(error)
    assert (type(arrived), arrived.message) == (errors.Draining, "ümlaut, 100 %\nnew line")
    assert arrived.retry_after_seconds == 3


async def test_a_status_that_was_set(edge: Dialer) -> None:
    error = await failure(unary(edge, "Code")(b"set, not raised", timeout=5))
    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "set, not raised")


async def test_an_error_after_the_first_message_comes_after_it(edge: Dialer) -> None:
    call = stream(edge, "Break")(b"", timeout=5)
    assert await call.read() == b"first"
    error = await failure(call.read())
    assert type(error_from_rpc(error)) is errors.ReplicaLost


async def test_an_unknown_method_is_unimplemented(edge: Dialer) -> None:
    for name in ("Nothing", "", "Unary/x"):
        assert (await failure(unary(edge, name)(b"", timeout=5))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_component_outside_the_policy_is_refused_in_every_kind_of_call(
    server: MeshServer, echo: Echo, authority: CertificateAuthority, tmp_path: Path
) -> None:
    identity = authority.issue("storage", tmp_path / "storage")
    async with Dialer(server.address, identity=identity, peer="worker") as dialer:
        for call in (unary(dialer, "Unary")(b"", timeout=5), drained(stream(dialer, "Wait")(b"", timeout=5))):
            assert (await failure(call)).code() is grpc.StatusCode.PERMISSION_DENIED
        conversation = both(dialer, "Both")(nothing(), timeout=5)
        assert (await failure(drained(conversation))).code() is grpc.StatusCode.PERMISSION_DENIED
    assert echo.running_count == 0


async def test_a_cancel_reaches_the_handler_at_once(edge: Dialer, echo: Echo) -> None:
    for number in range(1, 6):
        call = stream(edge, "Wait")(b"", timeout=30)
        assert await call.read() == b"here"
        began = time.monotonic()
        call.cancel()
        await until(lambda wanted=number: len(echo.cancelled_at) == wanted)  # type: ignore[misc]
        # Milliseconds on a quiet machine; a garbage collector or a timer would take far longer than this.
        assert echo.cancelled_at[-1] - began < 0.25
    assert echo.running_count == 0


async def test_a_deadline_ends_call_and_handler(edge: Dialer, echo: Echo) -> None:
    began = time.monotonic()
    error = await failure(drained(stream(edge, "Wait")(b"", timeout=0.3)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: len(echo.cancelled_at) == 1)
    assert 0.2 < echo.cancelled_at[0] - began < 2.0
    assert 0 < float(await unary(edge, "Remaining")(b"", timeout=7)) <= 7.1


async def test_a_lost_client_cancels_its_calls(
    server: MeshServer, echo: Echo, authority: CertificateAuthority, tmp_path: Path
) -> None:
    identity = authority.issue("edge", tmp_path / "edge")
    async with Dialer(server.address, identity=identity, peer="worker") as dialer:
        calls = [stream(dialer, "Wait")(b"", timeout=30) for _ in range(5)]
        for call in calls:
            assert await call.read() == b"here"
    await until(lambda: len(echo.cancelled_at) == 5)


async def test_a_client_that_does_not_read_stops_the_writer(edge: Dialer, echo: Echo) -> None:
    process = psutil.Process()
    call = stream(edge, "Flood")(b"", timeout=60)
    assert len(await call.read()) == 32 << 10
    written, before = -1, process.memory_info().rss
    async with asyncio.timeout(20):
        while written != echo.written_count:
            written = echo.written_count
            await asyncio.sleep(0.5)
    # Both ends are this process: windows and buffers of two sides.
    assert echo.written_count < 3_000
    assert process.memory_info().rss - before < 96 * MEBIBYTE
    # Others are not held up, and reading on lets the writer go on.
    assert await unary(edge, "Unary")(b"still here", timeout=5) == b"still here"
    for _ in range(written + 10):
        assert len(await call.read()) == 32 << 10
    call.cancel()


async def test_a_handler_that_does_not_read_stops_the_client(edge: Dialer, echo: Echo) -> None:
    call = both(edge, "Read")(timeout=60)
    sent_count = 0

    async def send() -> None:
        nonlocal sent_count
        for _ in range(600):
            await call.write(bytes(64 << 10))
            sent_count += 1
        await call.done_writing()

    async with asyncio.TaskGroup() as group:
        group.create_task(send(), name="send")
        await asyncio.sleep(1.0)
        assert sent_count < 600
        assert await unary(edge, "Unary")(b"still here", timeout=5) == b"still here"
        echo.may_read.set()
    assert await call.read() is grpc.aio.EOF
    assert (sent_count, echo.read_count) == (600, 600)


async def test_a_handler_that_never_waits_leaves_the_loop_to_others(edge: Dialer, echo: Echo) -> None:
    reading = asyncio.Event()

    async def read_on() -> None:
        async for _ in stream(edge, "Flood")(b"", timeout=30):
            reading.set()

    async with asyncio.TaskGroup() as group:
        reader = group.create_task(read_on(), name="reader")
        await reading.wait()
        for _ in range(5):
            assert await unary(edge, "Unary")(b"x", timeout=5) == b"x"
        reader.cancel()


async def test_draining_refuses_new_calls_and_lets_running_ones_end(
    server: MeshServer, edge: Dialer, echo: Echo
) -> None:
    running = both(edge, "Both")(timeout=20)
    await running.write(b"1")
    assert await running.read() == b"1"
    async with asyncio.TaskGroup() as group:
        drain = group.create_task(server.drain(10.0), name="drain")
        await asyncio.sleep(0.2)
        refused = await failure(unary(edge, "Unary")(b"", timeout=1))
        assert refused.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        await running.write(b"2")
        assert await running.read() == b"2"
        assert not drain.done()
        await running.done_writing()
        assert await running.read() is grpc.aio.EOF
    assert await running.code() is grpc.StatusCode.OK


async def test_a_drain_ends_in_time_whatever_runs(server: MeshServer, edge: Dialer, echo: Echo) -> None:
    call = stream(edge, "Wait")(b"", timeout=30)
    assert await call.read() == b"here"
    began = time.monotonic()
    await server.drain(0.3)
    assert time.monotonic() - began < 3.0
    error = await failure(call.read())
    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await until(lambda: len(echo.cancelled_at) == 1)


async def test_streams_outlive_a_renewal_and_new_connections_see_the_new_leaf(
    server: MeshServer, edge: Dialer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    old = both(edge, "Both")(timeout=30)
    await old.write(b"1")
    assert await old.read() == b"1"
    # The new leaf is of another component: whoever dials now can tell.
    authority.issue("registry", tmp_path / "worker")
    async with Dialer(server.address, identity=authority.issue("edge", tmp_path / "other"), peer="registry") as fresh:
        assert await unary(fresh, "Unary")(b"new", timeout=5) == b"new"
    await old.write(b"2")
    assert await old.read() == b"2"
    await old.done_writing()


async def test_health_follows_the_server(server: MeshServer, edge: Dialer) -> None:
    call = stream(edge, f"/{HEALTH_SERVICE}/Watch")(b"", timeout=10)
    assert await call.read() == b"\x08\x01"
    await server.set_serving(is_serving=False)
    assert await call.read() == b"\x08\x02"
    call.cancel()


@pytest.mark.parametrize("listen", ["127.0.0.1:0"])
async def test_grpcurl_lists_services(server: MeshServer, authority: CertificateAuthority, tmp_path: Path) -> None:
    identity = authority.issue("edge", tmp_path / "edge")
    command = [GRPCURL, "-cacert", str(identity.ca), "-cert", str(identity.certificate), "-key", str(identity.key)]
    command += ["-authority", "worker.helios.internal", server.address, "list"]
    result = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=20, text=True, check=False)
    assert HEALTH_SERVICE in result.stdout, result.stderr


async def nothing() -> AsyncIterator[bytes]:
    """A request of no messages."""
    for message in tuple[bytes]():
        yield message


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
