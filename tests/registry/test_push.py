"""Pushing to a real OCI registry: only what it lacks, on from where it broke off, and the same digest afterwards."""

import asyncio
import base64
import io
import json
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from rich.console import Console

from helios.api.registry.v1.push_service_pb2_grpc import add_PushServiceServicer_to_server
from helios.cli import models_push
from helios.cli.state import StateDirectory
from helios.mesh.channel import Dialer
from helios.mesh.errors import (
    HeliosError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from helios.mesh.server import MeshServer, ServerOptions
from helios.registry import access
from helios.registry.push.client import PushClient
from helios.registry.push.journal import PushJournal
from helios.registry.push.pusher import Pusher
from helios.registry.push.records import PushDone
from helios.registry.push.servicer import PushServicer
from helios.registry.push.settings import PushSettings
from helios.registry.push.steps import Push
from helios.registry.records import IngestProgress, PushPhase
from helios.registry.sources.settings import OciSettings, SourceSettings
from helios.registry.sources.web import Web
from tests.emulators import faulty_proxy as faults
from tests.emulators.docker_registry import BINARY, PASSWORD, TokenService, docker_registry
from tests.emulators.faulty_proxy import FaultyProxy
from tests.registry import tiny
from tests.registry.support import Mesh, Parts, open_parts
from tests.registry.test_pull_places import stored

CHUNK = 64 << 10
# Some eight chunks.
FILLER = 500_000


@dataclass
class Here:
    """A registry with a model ``m``, and what pushes from it."""

    parts: Parts
    pusher: Pusher
    revision: str
    size_bytes: int
    weights_bytes: int

    async def push(self, target: str, model: str = "m") -> PushDone:
        """Pushes to the end."""
        events = [event async for event in self.pusher.push(model, target)]
        assert isinstance(events[-1], PushDone)
        return events[-1]


@asynccontextmanager
async def open_here(root: Path, oci: OciSettings | None = None, *, in_flight: int = 4) -> AsyncIterator[Here]:
    oci = oci or OciSettings(docker_config=None)
    async with open_parts(root / "registry", source_settings=SourceSettings(oci=oci)) as parts, Web(attempts=4) as web:
        settings = PushSettings(chunk_bytes=CHUNK, in_flight=in_flight)
        journal = PushJournal(parts.state.root / "pushes", keep_seconds=3600)
        async with Pusher(parts.store, parts.blobs, web, journal, settings=settings, oci=oci) as pusher:
            if not (root / "model").exists():
                tiny.write_big(root / "model", FILLER)
            model = (await parts.ingest("m", root / "model")).model
            weights_bytes = (root / "model" / "model.safetensors").stat().st_size
            yield Here(parts, pusher, model.revision.digest, model.revision.size_bytes, weights_bytes)


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    """A registry for anybody; tests take repositories of their own."""
    assert BINARY.exists(), "make debian unpacks it"
    with docker_registry() as address:
        yield address


@pytest.fixture
def proxy(registry: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(registry) as opened:
        yield opened


def sent(proxy: FaultyProxy, method: str, part: str = "") -> int:
    return sum(one == method and part in target for one, target in proxy.requests)


async def test_what_is_pushed_and_pulled_again_is_the_same_revision(tmp_path: Path, registry: str) -> None:
    async with open_here(tmp_path) as here:
        done = await here.push(f"oci://{registry}/same/m:v1")
        assert done.revision == here.revision
        assert done.location == f"oci://{registry}/same/m@{here.revision}"
        assert done.sent_bytes == here.size_bytes
        files = await stored(here.parts, here.revision)
        async with open_parts(tmp_path / "other") as other:
            for source in (f"oci://{registry}/same/m:v1", done.location):
                pulled = await other.ingest("copy", source)
                assert pulled.model.revision.digest == here.revision
            assert await stored(other, here.revision) == files


async def test_what_the_target_has_is_not_sent(tmp_path: Path, proxy: FaultyProxy) -> None:
    async with open_here(tmp_path) as here:
        target = f"oci://{proxy.address}/known/m"
        await here.push(f"{target}:v1")
        proxy.requests.clear()
        again = await here.push(f"{target}:v1")
        assert (again.sent_bytes, again.known_bytes) == (0, here.size_bytes)
        assert proxy.requests == [("HEAD", "/v2/known/m/manifests/v1")]
        await here.push(f"{target}:v2")
        assert sent(proxy, "POST") == 0
        # A repository beside it takes the blobs from there.
        mounted = await here.push(f"oci://{proxy.address}/known/other")
        assert mounted.sent_bytes == 0
        assert sent(proxy, "PATCH") == 0


async def test_a_tag_and_a_digest_of_a_model_can_be_pushed(tmp_path: Path, registry: str) -> None:
    async with open_here(tmp_path) as here:
        first = here.revision
        second = (
            await here.parts.ingest("m", tiny.write_model(tmp_path / "next"), tags=("next",))
        ).model.revision.digest
        assert first != second
        for model, expected in (("m@next", second), (f"m@{first[7:19]}", first), ("m", second)):
            assert (await here.push(f"oci://{registry}/tags/m:{expected[7:13]}", model)).revision == expected
        with pytest.raises(InvalidRequest, match="can't be pushed as"):
            await here.push(f"oci://{registry}/tags/m@{first}", "m")
        with pytest.raises(NotFound):
            await here.push(f"oci://{registry}/tags/m:v1", "m@none")
        with pytest.raises(InvalidRequest) as caught:
            await here.push("hf:org/m", "m")
        assert caught.value.reason == "INVALID_TARGET"


@pytest.mark.parametrize("fault", ["500", "429", "reset", "lost chunk", "lost finish", "lost manifest", "damaged"])
async def test_a_bad_network_changes_nothing(tmp_path: Path, proxy: FaultyProxy, fault: str) -> None:
    broken = {
        "500": [faults.status(503, method=method) for method in ("HEAD", "POST", "PATCH", "PUT")],
        "429": [faults.status(429, retry_after=1, method=method) for method in ("HEAD", "PATCH", "PUT")],
        "reset": [faults.reset_request(method="PATCH", times=2), faults.reset_request(method="PUT")],
        "lost chunk": [faults.lost_answer(method="PATCH", times=2)],
        "lost finish": [faults.lost_answer(method="PUT", part="/uploads/")],
        "lost manifest": [faults.lost_answer(method="PUT", part="/manifests/")],
        "damaged": [faults.damaged_request(method="PATCH")],
    }[fault]
    repository = fault.replace(" ", "-")
    expected = sum(one.times for one in broken)
    async with open_here(tmp_path) as here:
        proxy.inject(*broken)
        done = await here.push(f"oci://{proxy.address}/bad/{repository}:v1")
        assert done.revision == here.revision
        assert proxy.broken_count == expected
        async with open_parts(tmp_path / "other") as other:
            pulled = await other.ingest("copy", f"oci://{proxy.address}/bad/{repository}:v1")
            assert pulled.model.revision.digest == here.revision


async def test_a_push_goes_on_where_the_last_one_broke_off(tmp_path: Path, proxy: FaultyProxy) -> None:
    target = f"oci://{proxy.address}/resumed/m:v1"
    async with open_here(tmp_path) as here:
        # A registry that names more than a minute is not waited for.
        proxy.inject(faults.status(503, retry_after=100, method="PATCH", after=4))
        with pytest.raises(Unavailable) as caught:
            await here.push(target)
        assert caught.value.reason == "TARGET_UNAVAILABLE"
        assert caught.value.retry_after_seconds == 100
    proxy.requests.clear()
    # Another process of the registry, which knows only what was noted.
    async with open_here(tmp_path) as here:
        done = await here.push(target)
        assert done.revision == here.revision
        assert not list((here.parts.state.root / "pushes").iterdir())
    assert sent(proxy, "PATCH") == math.ceil(here.weights_bytes / CHUNK) - 4
    assert done.sent_bytes <= here.size_bytes - 4 * CHUNK


async def test_pushes_are_bounded_and_end_with_their_callers(tmp_path: Path, proxy: FaultyProxy) -> None:
    async with open_here(tmp_path) as here:
        proxy.inject(faults.status(429, retry_after=50, method="PATCH", times=100))
        async with aclosing(here.pusher.push("m", f"oci://{proxy.address}/left/m:v1")) as events:
            async for event in events:
                if isinstance(event, IngestProgress) and event.phase is PushPhase.SEND:
                    break
            async with aclosing(here.pusher.push("m", f"oci://{proxy.address}/left/n:v1")) as others:
                await anext(others)
                with pytest.raises(Overloaded) as refused:
                    await here.push(f"oci://{proxy.address}/left/o:v1")
                assert refused.value.reason == "TOO_MANY_PUSHES"
        proxy.heal()
        # The blobs are free again, and so is the place.
        assert await here.parts.catalog.delete_model("m") > 0


async def test_two_pushes_send_a_blob_once(tmp_path: Path, proxy: FaultyProxy) -> None:
    async with open_here(tmp_path) as here:
        targets = [f"oci://{proxy.address}/shared/m:v{number}" for number in range(2)]
        async with asyncio.TaskGroup() as group:
            pushes = [group.create_task(here.push(target), name=target) for target in targets]
        sent_bytes = sum(push.result().sent_bytes for push in pushes)
        assert sent_bytes == here.size_bytes


async def test_what_another_push_sent_after_the_look_is_not_sent_again(
    tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_all, order = Push._send_all, iter((0, 1))
    both_looked, first_sent = asyncio.Barrier(2), asyncio.Event()

    async def one_after_the_other(push: Push, *args: Any) -> Any:
        number = next(order)
        await both_looked.wait()
        if number:
            await first_sent.wait()
        try:
            return await send_all(push, *args)
        finally:
            first_sent.set()

    monkeypatch.setattr(Push, "_send_all", one_after_the_other)
    async with open_here(tmp_path) as here, asyncio.timeout(30):
        async with asyncio.TaskGroup() as group:
            targets = [f"oci://{proxy.address}/after/m:v{number}" for number in range(2)]
            pushes = [group.create_task(here.push(target), name=target) for target in targets]
        assert sorted(push.result().sent_bytes for push in pushes) == [0, here.size_bytes]


async def test_a_password_is_shown_to_who_wants_it(tmp_path: Path) -> None:
    with docker_registry(has_password=True) as address:
        target = f"oci://{address}/org/m:v1"
        async with open_here(tmp_path / "anybody") as here:
            with pytest.raises(PreconditionFailed, match="docker login") as missing:
                await here.push(target)
            assert missing.value.reason == "TARGET_LOGIN_MISSING"
        wrong = OciSettings(credentials={address: SecretStr("user:wrong")})
        async with open_here(tmp_path / "wrong", wrong) as here:
            with pytest.raises(PermissionDenied) as refused:
                await here.push(target)
            assert refused.value.reason == "TARGET_ACCESS_DENIED"
            assert "wrong" not in refused.value.message
        login = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        docker = tmp_path / "config.json"
        docker.write_text(json.dumps({"auths": {address: {"auth": login}}}))
        for root, oci in {
            "settings": OciSettings(credentials={address: SecretStr(f"user:{PASSWORD}")}, docker_config=None),
            "docker": OciSettings(docker_config=docker),
        }.items():
            async with open_here(tmp_path / root, oci) as here:
                assert (await here.push(f"oci://{address}/{root}/m:v1")).revision == here.revision


async def test_tokens_are_got_for_what_is_done_and_renewed(tmp_path: Path) -> None:
    with TokenService(seconds=2) as tokens, docker_registry(tokens=tokens) as address, FaultyProxy(address) as proxy:
        password = OciSettings(credentials={proxy.address: SecretStr(f"user:{PASSWORD}")})
        async with open_here(tmp_path, password) as here:
            # So slow that tokens end meanwhile.
            proxy.inject(faults.status(429, retry_after=2, method="PATCH", times=1))
            done = await here.push(f"oci://{proxy.address}/org/m:v1")
            assert done.revision == here.revision
            assert len(tokens.handed_out) > 1
            assert tokens.handed_out[0] == ["repository:org/m:pull,push"]
            mounted = await here.push(f"oci://{proxy.address}/org/other:v1")
            assert mounted.sent_bytes == 0
            assert tokens.handed_out[-1] == ["repository:org/other:pull,push", "repository:org/m:pull"]
        docker = tmp_path / "config.json"
        docker.write_text(json.dumps({"auths": {proxy.address: {"identitytoken": tokens.identity_token}}}))
        async with open_parts(
            tmp_path / "other", source_settings=SourceSettings(oci=OciSettings(docker_config=docker))
        ) as other:
            pulled = await other.ingest("m", f"oci://{proxy.address}/org/m:v1")
            assert pulled.model.revision.digest == done.revision
        anybody = OciSettings(docker_config=None)
        async with open_here(tmp_path / "anybody", anybody) as here:
            with pytest.raises(HeliosError) as missing:
                await here.push(f"oci://{proxy.address}/org/m:v1")
            assert missing.value.reason == "TARGET_LOGIN_MISSING"


async def test_people_push_through_the_mesh_and_nobody_else(
    tmp_path: Path, registry: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_here(tmp_path) as here:
        server = MeshServer(
            listen="127.0.0.1:0",
            identity=mesh.identity("registry"),
            policy=access.POLICY,
            options=ServerOptions(drain_seconds=1.0),
        )
        add_PushServiceServicer_to_server(PushServicer(here.pusher), server.grpc)
        server.serve(access.PUSH_SERVICE)
        async with server:
            async with mesh.dialer(server.address, "admin-edge") as dialer:
                events = [event async for event in PushClient(dialer).push("m", f"oci://{registry}/mesh/m:v1")]
                assert isinstance(events[-1], PushDone)
                assert events[-1].revision == here.revision
                phases = [event.phase for event in events if isinstance(event, IngestProgress)]
                assert phases
                assert set(phases) <= {PushPhase.SEND, PushPhase.COMMIT}
                with pytest.raises(NotFound) as missing:
                    await anext(PushClient(dialer).push("none", f"oci://{registry}/mesh/m:v1"))
                assert missing.value.reason == "MODEL_NOT_FOUND"
            lines, screen = io.StringIO(), io.StringIO()

            @asynccontextmanager
            async def open_admin(state: StateDirectory) -> AsyncIterator[Dialer]:
                del state
                async with mesh.dialer(server.address, "admin-edge") as dialer:
                    yield dialer

            monkeypatch.setattr(models_push, "open_admin", open_admin)
            for output, tag, is_json in ((lines, "v2", True), (screen, "v3", False)):
                await models_push.models_push(
                    StateDirectory(tmp_path),
                    Console(file=output, width=200),
                    "m",
                    f"oci://{registry}/mesh/m:{tag}",
                    is_json=is_json,
                )
            location = f"oci://{registry}/mesh/m@{here.revision}"
            done = json.loads(lines.getvalue().splitlines()[-1])["done"]
            assert done == {
                "model": "m",
                "revision": here.revision,
                "location": location,
                "sent_bytes": 0,
                "known_bytes": here.size_bytes,
            }
            assert f"m is {location}, 0 B sent" in screen.getvalue()
            async with mesh.dialer(server.address, "storage") as dialer:
                with pytest.raises(PermissionDenied):
                    await anext(PushClient(dialer).push("m", f"oci://{registry}/mesh/m:v1"))
