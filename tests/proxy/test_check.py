"""Envoy's question, which is answered at once or with nothing: what it is told, and what stays noted of it."""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from prometheus_client import REGISTRY

from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.api.inference.v1 import inference_service_pb2 as inference_pb
from helios.api.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.envoy.admin import EnvoyAdmin
from helios.mesh.names import SESSION_HEADER, TIER_HEADER, kept_header
from helios.mesh.server import MeshServer
from helios.proxy import __main__ as proxy_main
from helios.proxy.admission.bucket import Bucket
from helios.proxy.admission.keyring import Caller
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.fleet.state import Load
from helios.proxy.holds import Hold
from helios.proxy.picker.check import METHOD
from helios.proxy.picker.choosing import Chooser
from helios.proxy.runtime import Runtime
from helios.proxy.settings import AdmissionSettings, RoutingSettings
from helios.proxy.traffic import LoadDelta
from helios.registry.client import KeySpec
from tests.ports import free_port
from tests.proxy.fakes import Answer, FakeEnvoy, FakeWorker, until
from tests.proxy.harness import Proxy, World, small_world
from tests.proxy.test_engine_settings import settings
from tests.proxy.test_gateway import Edge, running_edge
from tests.proxy.test_keys_gateway import accepted, guarded_edge
from tests.proxy.test_sent_along import framed

pytestmark = pytest.mark.leaks("Envoy keeps connections to servers of this process until it is gone")
ENDPOINT = "x-helios-endpoint"
SECRET = "sk-helios-of-this-test"
LIMITED = {"authorization": f"Bearer {SECRET}"}
# Nothing that was used comes back within a test.
KEY = Caller("k", tenant="t", requests_per_minute=6, tokens_per_minute=6000)
NO_LANE = RoutingSettings(express_models=0)


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> list[Runtime]:
    """Gives those of the proxies that the test runs."""
    made: list[Runtime] = []

    class Noted(Runtime):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(proxy_main, "Runtime", Noted)
    return made


@dataclass
class Side:
    """A proxy with a warm model "m" of some replicas, and all that the picker is asked about."""

    proxy: Proxy
    envoy: FakeEnvoy
    worker: FakeWorker
    runtime: Runtime

    @property
    def core(self) -> Core:
        """Its core."""
        return self.runtime.core

    @property
    def entry(self) -> ModelEntry:
        """The model's."""
        found = self.core.catalogue.get("m")
        assert found is not None
        return found

    def change(self, changed: ModelEntry) -> None:
        """Makes or changes a model, behind the registry's back."""
        self.runtime.apply(self.core.model_upserted(changed, time.monotonic()))

    def key(self, *callers: Caller) -> None:
        """Has exactly these keys; the first one's secret is `SECRET`, those of others end in a number."""
        secrets = (f"{SECRET}{number or ''}".encode() for number in range(len(callers)))
        digests = (hashlib.sha256(secret).digest() for secret in secrets)
        self.core.keyring.replace(zip(digests, callers, strict=True))

    def noted(self) -> object:
        """All that is noted of requests, but for what a look at it changes."""
        traffic, quotas = self.core.traffic, self.core.traffic.quotas
        buckets = [
            (key, vars(limit))
            for key, account in quotas._accounts.items()
            for limit in (account.requests, account.tokens)
            if isinstance(limit, Bucket) and (limit._reserved or limit._empty_at)
        ]
        return (
            dict(traffic.ledger._reservations),
            list(quotas._held),
            json.dumps(buckets, default=str),
            [record.request_id for record in self.runtime.journal.recent()],
            traffic._prefixes.block_count,
            dict(traffic.uses()),
            self.core.holds.statistics(),
            REGISTRY.get_sample_value("helios_picks_total", {"outcome": "picked"}),
        )

    async def nothing(self, *, why: str, **asked: Any) -> None:
        """Asks, and is told nothing, and nothing is noted of it."""
        before = self.noted()
        assert await self.envoy.check(**asked) == {}, why
        assert self.noted() == before, why


@asynccontextmanager
async def warm(world: World, runtimes: list[Runtime], *, replicas: int = 1, **overrides: Any) -> AsyncIterator[Side]:
    """A proxy whose model "m" is warm and called "alias", too."""
    world.registry.put("m", aliases=["alias"], min_replicas=replicas)
    overrides = {"routing": NO_LANE} | overrides
    addresses = (f"10.0.0.{number}:1" for number in range(1, 100))
    worker = FakeWorker(address=lambda: next(addresses))
    async with small_world(world, worker=worker, **overrides) as (proxy, envoy, _):
        await until(lambda: len(envoy.endpoints) == replicas)
        (runtime,) = runtimes
        await until(lambda: runtime.core.traffic.table.count("m", "sha256:1") == replicas)
        yield Side(proxy, envoy, worker, runtime)


def prompt_body(text: str, **more: Any) -> bytes:
    """A conversation as Envoy sends it: long enough to be looked at."""
    return framed(json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]} | more).encode())


async def both(
    side: Side, model: str = "m", *, body: bytes = b"", headers: dict[str, str] | None = None, **asked: Any
) -> tuple[dict[str, str], dict[str, str]]:
    """What is told of one request by question, and then of the same request by conversation, as if never asked."""
    same = {"x-request-id": "same", "x-helios-body-bytes": str(len(body))} | (headers or {})
    told = await side.envoy.check(model, body=body, headers=same, **asked)
    assert side.core.traffic.ledger.statistics().reserved_count == 1
    side.core.traffic.unreached("same", time.monotonic(), is_failure=False)
    answer = await side.envoy.ask(model, body=body, headers=same, **asked)
    side.core.traffic.unreached("same", time.monotonic(), is_failure=False)
    assert answer.status == 200, answer
    return told, answer.headers


async def test_what_is_picked_at_once_is_told_as_the_conversation_tells_it(
    world: World, runtimes: list[Runtime]
) -> None:
    async with warm(world, runtimes) as side:
        told, said = await both(side)
        assert told == said
        assert told == {
            ENDPOINT: "10.0.0.1:1",
            "x-helios-route-model": "m",
            "x-helios-route-revision": "sha256:1",
            "x-envoy-max-retries": "0",
        }
        told, said = await both(side, "alias")
        assert (told, told["x-helios-route-model"]) == (said, "alias")
        for _ in range(2):
            await side.envoy.check(request_id="twice")
            assert side.core.traffic.ledger.statistics().reserved_count == 1, "one request, asked about twice"


async def test_what_a_request_says_bears_on_its_pick_as_in_the_conversation(
    world: World, runtimes: list[Runtime]
) -> None:
    async with warm(world, runtimes, replicas=2) as side:
        for number in range(4):
            told, said = await both(side, body=prompt_body(f"number {number} " * 200))
            assert told == said, number
            assert told["x-envoy-max-retries"] == "1"
            assert "x-helios-cohort" in told
        homes = set[str]()
        for number in range(8):
            told, said = await both(side, headers={SESSION_HEADER: f"session {number}"})
            assert told == said
            homes.add(told[ENDPOINT])
        assert len(homes) == 2
        for number in range(8):
            told, said = await both(side, lifted={"user": f"user {number}", "max_tokens": 100})
            assert told == said
        # By a field that Envoy lifts, and by the same one in a body that is read.
        told, said = await both(side, lifted={"service_tier": "flex"})
        assert (told, told["x-helios-priority"], told[kept_header(TIER_HEADER)]) == (said, "1", "flex")
        tiered = prompt_body("urgent " * 200, service_tier="flex")
        told, said = await both(side, body=tiered, lifted={"service_tier": "flex"})
        assert (told, told["x-helios-priority"]) == (said, "1")
        told, said = await both(side, headers={"x-service-tier": "flex"})
        assert (told, told["x-helios-priority"]) == (said, "1")


async def test_a_key_is_told_where_it_stands_and_pays_once(world: World, runtimes: list[Runtime]) -> None:
    async with warm(world, runtimes, admission=AdmissionSettings(require_keys=True)) as side:
        side.key(KEY, replace(KEY, key_id="other"))
        told = await side.envoy.check(headers=LIMITED, lifted={"max_tokens": 50})
        other = {"authorization": f"Bearer {SECRET}1", "x-helios-body-bytes": "0"}
        said = (await side.envoy.ask(headers=other, lifted={"max_tokens": 50})).headers
        volatile = {name for name in said if "-reset-" in name}
        assert len(volatile) == 2
        assert {name: value for name, value in told.items() if name not in volatile} == {
            name: value for name, value in said.items() if name not in volatile
        }
        assert told.keys() == said.keys()
        remaining = next(value for name, value in told.items() if "remaining-requests" in name)
        assert remaining == "5"
        assert len(side.core.traffic.quotas._held) == 2, "tokens are kept until the replica tells of the request"


async def test_what_was_reserved_is_given_back_where_a_pick_was_foreseen_and_is_none(
    world: World, runtimes: list[Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with warm(world, runtimes) as side:
        side.key(KEY)
        monkeypatch.setattr(Chooser, "pick", lambda *_, **__: None)
        assert await side.envoy.check(headers=LIMITED) == {}
        assert not side.core.traffic.quotas._held


Case = Callable[[Side], dict[str, Any]]


def busy_with_others(side: Side, *, band: int) -> None:
    """Somebody waits, though a replica would take requests."""
    caller = Caller(priority=band)
    side.core.holds.admit(Hold(1 << 40, "waits", "m", 0, time.monotonic(), time.monotonic() + 60, caller=caller))


def rolled_out(side: Side) -> dict[str, Any]:
    other = replace(side.entry, name="m@aaaaaaaaaaaa", revision="sha256:" + "a" * 64, aliases=(), min_replicas=0)
    side.change(other)
    side.change(replace(side.entry, canary=other.name, canary_percent=10))
    return {}


def changed(**fields: Any) -> Case:
    def change(side: Side) -> dict[str, Any]:
        side.change(replace(side.entry, **fields))
        return {}

    return change


def waited_for(side: Side) -> dict[str, Any]:
    busy_with_others(side, band=2)
    return {}


def given_key(**fields: Any) -> Case:
    def change(side: Side) -> dict[str, Any]:
        side.key(replace(KEY, **fields))
        return {}

    return change


CASES: dict[str, Case] = {
    "a model at zero": lambda _: {"model": "cold"},
    "an unknown model": lambda _: {"model": "nope"},
    "no model": lambda _: {"model": None},
    "a wrong key": lambda _: {"headers": {"authorization": f"Bearer {SECRET}x"}},
    "no key": lambda _: {"headers": {"authorization": ""}},
    "a key for other models": given_key(models=("other",)),
    "more tokens than the key has left": lambda _: {"lifted": {"max_tokens": 5990}},
    "more tokens than the key ever has": lambda _: {"lifted": {"max_tokens": 60_000}},
    "no such tier": lambda _: {"lifted": {"service_tier": "fast"}},
    "a model that is no string": lambda _: {"model": None, "lifted": {"model": 3}},
    "a rollout": rolled_out,
    "durable by policy": changed(is_durable=True),
    "a replica of prefill": changed(engine_settings=settings(role="prefill")),
    "header and body differ": lambda _: {"headers": LIMITED | {"x-helios-model": "alias"}},
    "a body that can't be read": lambda _: {"body": prompt_body("x" * 1000)[:-1]},
    "others wait": waited_for,
    "Envoy has begun the conversation": lambda _: {"age_seconds": 1.0},
}


async def test_nothing_is_said_and_nothing_stays_noted_of_what_is_no_pick(
    world: World, runtimes: list[Runtime]
) -> None:
    admission = AdmissionSettings(require_keys=True)
    world.registry.put("cold")
    async with warm(world, runtimes, replicas=2, admission=admission) as side:
        usual = side.entry
        for number, (why, prepare) in enumerate(CASES.items()):
            side.key(KEY)
            side.core.traffic.quotas._accounts.clear()
            # Else any of them might be told nothing for a reason that is not its own. It uses the key, too.
            assert ENDPOINT in await side.envoy.check(headers=LIMITED, body=prompt_body("x" * 1000)), why
            asked = {"headers": LIMITED} | prepare(side)
            await side.nothing(why=why, **asked)
            side.core.holds.take_all("m")
            side.change(usual)
            side.key(KEY)
            after = await side.envoy.ask(headers=LIMITED, lifted={"max_tokens": 1})
            remaining = next(value for name, value in after.headers.items() if "remaining-requests" in name)
            assert remaining == "4", f"{why}: the first and this one, number {number}"
        assert len(side.worker.starts) == 2, "nor was anything started"


async def test_limits_that_another_proxy_grants_are_asked_for_in_the_conversation(
    world: World, runtimes: list[Runtime]
) -> None:
    async with warm(world, runtimes) as side:
        side.key(KEY)
        side.core.lifecycle.leads = False
        try:
            await side.nothing(why="a follower has no part of them yet", headers=LIMITED)
            side.key(replace(KEY, requests_per_minute=0, tokens_per_minute=0))
            assert ENDPOINT in await side.envoy.check(headers=LIMITED), "this key has none"
        finally:
            side.core.lifecycle.leads = True


async def test_a_request_that_is_asked_about_again_leaves_no_prompt_where_it_did_not_go(
    world: World, runtimes: list[Runtime]
) -> None:
    async with warm(world, runtimes, replicas=2) as side:
        first = await side.envoy.check(request_id="same", body=prompt_body("a" * 1000))
        noted = side.core.traffic._prefixes.block_count
        second = await side.envoy.check(request_id="same", body=prompt_body("b" * 1000))
        assert first[ENDPOINT].partition(",")[0] != second[ENDPOINT].partition(",")[0]
        assert side.core.traffic._prefixes.block_count == noted > 0


async def test_a_key_at_its_limit_is_told_so_in_the_conversation(world: World, runtimes: list[Runtime]) -> None:
    async with warm(world, runtimes) as side:
        side.key(replace(KEY, requests_per_minute=1))
        assert ENDPOINT in await side.envoy.check(headers=LIMITED)
        await side.nothing(why="its only request is used", headers=LIMITED)
        refused = await side.envoy.ask(headers=LIMITED)
        assert (refused.status, refused.headers["x-helios-reason"]) == (429, "rate_limit_requests")
        assert ENDPOINT in await side.envoy.check(), "who has no key has no limit"


async def test_who_comes_while_others_wait_for_a_busy_replica_is_told_nothing(
    world: World, runtimes: list[Runtime]
) -> None:
    def load(waiting_count: int) -> None:
        (replica_id,) = side.worker.replicas
        delta = types_pb2.LoadDelta(replica_id=replica_id)
        delta.load.waiting_requests = waiting_count
        side.worker.say(load=fleet_pb.LoadReport(deltas=[delta]))

    async with warm(world, runtimes) as side:
        assert ENDPOINT in await side.envoy.check()
        load(64)
        await until(lambda: side.core.traffic.busy)
        await side.nothing(why="busy")
        async with asyncio.TaskGroup() as group:
            held = group.create_task(side.envoy.ask())
            await until(lambda: side.core.holds.count("m"))
            await side.nothing(why="busy, and another one waits")
            load(0)
        assert held.result().endpoint == "10.0.0.1:1"
        assert ENDPOINT in await side.envoy.check()


async def test_a_prompt_lands_where_it_was_by_question_or_conversation(world: World, runtimes: list[Runtime]) -> None:
    async def asked(body: bytes) -> Answer:
        headers = {"x-helios-body-bytes": str(len(body))}
        answer = await side.envoy.ask(body=body, headers=headers)
        assert answer.asked_body
        return answer

    def first(endpoints: str) -> str:
        return endpoints.partition(",")[0]

    async with warm(world, runtimes, replicas=2) as side:
        places = set[str]()
        for number in range(4):
            body = prompt_body(f"talk {number}, " * 300)
            if number >= 2:
                await side.envoy.check()
            if number % 2:
                place = first((await asked(body)).endpoint)
            else:
                place = first((await side.envoy.check(body=body))[ENDPOINT])
            # The other one has no more to do by now, and would be the first.
            assert first((await asked(body)).endpoint) == place
            assert first((await side.envoy.check(body=body))[ENDPOINT]) == place
            places.add(place)
            for reservation in list(side.core.traffic.ledger._reservations.values()):
                delta = LoadDelta(reservation.replica_id, Load(), finished=((reservation.request_id, 0),))
                side.runtime.apply(side.core.load_report([delta], time.monotonic()))
        assert places == {"10.0.0.1:1", "10.0.0.2:1"}


async def test_only_an_edge_may_ask_and_only_what_can_be_read(world: World, runtimes: list[Runtime]) -> None:
    async def status(component: str, *messages: bytes) -> grpc.StatusCode:
        async with Dialer(side.proxy.picker_address, identity=world.identity(component), peer="proxy") as dialer:
            channel: Any = dialer.stub(lambda channel: channel)
            call = channel.stream_unary(METHOD)(iter(messages), timeout=5)
            try:
                await call
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    async with warm(world, runtimes) as side:
        before = side.noted()
        assert await status("worker", b"") is grpc.StatusCode.PERMISSION_DENIED
        assert await status("worker", b"\xff") is grpc.StatusCode.PERMISSION_DENIED, "not read for who may not ask"
        assert await status("admin-edge", b"") is grpc.StatusCode.PERMISSION_DENIED
        assert await status("edge", b"\xff\xff") is grpc.StatusCode.INVALID_ARGUMENT
        assert await status("edge") is grpc.StatusCode.INVALID_ARGUMENT
        assert await status("edge", b"", b"") is grpc.StatusCode.INVALID_ARGUMENT
        assert await status("edge", b"") is grpc.StatusCode.OK, "of nothing, nothing is said"
        assert side.noted() == before


# The real Envoy.


class Counts:
    """What Envoy counts of its questions and conversations, since the last look."""

    def __init__(self, admin: EnvoyAdmin) -> None:
        self._admin = admin
        self._before: Counter[str] = Counter()

    async def since(self) -> dict[str, int]:
        """Those that have changed."""
        found = Counter[str]()
        for line in (await self._admin.prometheus()).splitlines():
            for name in ("ext_authz_ok", "ext_authz_error", "ext_proc_streams_started", "ext_proc_streams_failed"):
                if line.startswith(f"envoy_http_{name}{{") and '"edge_listener"' in line:
                    found[name] += int(line.rpartition(" ")[2])
        before, self._before = self._before, found
        return {name: count - before[name] for name, count in found.items() if count != before[name]}


OK, ERROR, STREAM = "ext_authz_ok", "ext_authz_error", "ext_proc_streams_started"


@asynccontextmanager
async def counted(world: World) -> AsyncIterator[tuple[Edge, httpx.AsyncClient, Counts]]:
    """A gateway that has answered a request of "m", a client, and what Envoy counts from here on."""
    world.registry.put("m")
    async with AsyncExitStack() as stack:
        edge = await stack.enter_async_context(running_edge(world, routing=NO_LANE))
        client = await stack.enter_async_context(edge.client())
        counts = Counts(await stack.enter_async_context(EnvoyAdmin(f"unix:{world.directory}/envoy.sock")))
        cold = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
        assert cold.status_code == 200, cold.text
        yield edge, client, counts


async def test_a_warm_rest_request_costs_one_question_and_others_a_conversation(world: World) -> None:
    async with counted(world) as (edge, client, counts):
        assert await counts.since() == {OK: 1, STREAM: 1}, "the cold one"
        for path in ("chat/completions", "completions", "embeddings"):
            for size in (10, 15_000):
                answer = await client.post(f"/v1/{path}", json={"model": "m", "prompt": "x" * size})
                assert answer.status_code == 200, answer.text
                assert answer.json()["headers"][ENDPOINT] == edge.worker.address()
                assert await counts.since() == {OK: 1}, (path, size)
        async with client.stream("POST", "/v1/chat/completions", json={"model": "m", "stream": True}) as streamed:
            assert "data: [DONE]" in (await streamed.aread()).decode()
        assert await counts.since() == {OK: 1}
        # In its frame it is longer than what Envoy sends of a body: a part is sent, and all of it arrives.
        body = json.dumps({"model": "m", "prompt": "x" * 15_900})
        wordy = {"content-type": f"application/json; note={'y' * 6000}"}
        answer = await client.post("/v1/completions", content=body, headers=wordy)
        assert (answer.status_code, answer.json()["size"], await counts.since()) == (200, len(body), {OK: 1})
        long = await client.post("/v1/completions", json={"model": "m", "prompt": "x" * 16_000})
        assert (long.status_code, await counts.since()) == (200, {STREAM: 1})
        async with grpc.aio.insecure_channel(edge.address) as channel:
            request = inference_pb.TokenizeRequest(model="m", text="hello")
            assert list((await InferenceServiceStub(channel).Tokenize(request, timeout=10)).token_ids) == [1, 2, 3]
        assert await counts.since() == {STREAM: 1}
        assert (await client.get("/v1/models")).status_code == 200
        assert await counts.since() == {}, "nobody asks where a list of models is"
        unknown = await client.post("/v1/completions", json={"model": "nope"})
        assert (unknown.status_code, await counts.since()) == (404, {OK: 1, STREAM: 1})


async def test_a_key_is_heard_in_the_question_and_its_limits_are_told(world: World) -> None:
    async with AsyncExitStack() as stack:
        edge, keys = await stack.enter_async_context(guarded_edge(world))
        client = await stack.enter_async_context(edge.client())
        counts = Counts(await stack.enter_async_context(EnvoyAdmin(f"unix:{world.directory}/envoy.sock")))
        _, secret = await keys.create(KeySpec("web", requests_per_minute=5, tokens_per_minute=5000), "test")
        assert (await accepted(client, secret)).status_code == 200
        await counts.since()
        headers = {"authorization": f"Bearer {secret}"}
        for remaining in "32":
            answer = await client.post("/v1/completions", json={"model": "m", "max_tokens": 5}, headers=headers)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-ratelimit-remaining-requests"] == remaining
            assert "authorization" not in answer.json()["headers"]
            assert await counts.since() == {OK: 1}
        wrong = await client.post(
            "/v1/completions", json={"model": "m"}, headers={"authorization": f"Bearer {secret}x"}
        )
        assert (wrong.status_code, await counts.since()) == (401, {OK: 1, STREAM: 1})


async def test_what_is_picked_at_once_is_explained_from_when_envoy_began(world: World) -> None:
    async with counted(world) as (edge, client, _), world.admin(edge.proxy) as (admin, _):
        began = datetime.now(UTC).timestamp()
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
        ended = datetime.now(UTC).timestamp()
        found = await admin.explain(answer.headers["x-request-id"])
        (picked,) = found.pick.candidates
        assert picked.replica_id == edge.worker.starts[0].replica_id
        (phase,) = [phase for phase in found.phases if phase.phase == "edge"]
        spent = phase.duration.ToNanoseconds() / 1e9
        assert 0 < spent < ended - began, "from Envoy's beginning to the question's arrival"


async def test_envoy_tries_another_replica_that_was_named_at_once(world: World) -> None:
    async with counted(world) as (edge, client, counts), world.envoy(edge.proxy) as envoy:
        dead = f"127.0.0.1:{free_port()}"
        edge.worker.address = lambda: dead
        world.registry.put("m", min_replicas=2)
        await until(lambda: dead in envoy.endpoints)
        await counts.since()
        for size in (1, 1, 1, 1, 2000, 3000):
            answer = await client.post("/v1/completions", json={"model": "m", "prompt": "x" * size})
            assert answer.status_code == 200, answer.text
        # Nor is a body asked for that matters here: it comes with the question.
        assert await counts.since() == {OK: 6}
        named = [call.metadata[ENDPOINT] for call in edge.replica.calls]
        assert any(one.startswith(f"{dead},") for one in named), named


async def test_a_proxy_that_knows_no_questions_is_talked_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MeshServer, "answer_at_once", lambda *_: None)
    async with counted(world) as (_, client, counts):
        await counts.since()
        for size in (10, 15_000):
            answer = await client.post("/v1/completions", json={"model": "m", "prompt": "x" * size})
            assert (answer.status_code, answer.json()["size"] > size) == (200, True)
            assert await counts.since() == {ERROR: 1, STREAM: 1}


async def test_a_proxy_that_is_slow_to_answer_a_question_is_talked_with(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(message: bytes, _: Any) -> bytes:
        await asyncio.sleep(5)
        return message

    def register(server: MeshServer, path: str, _: object) -> None:
        service, _, method = path.strip("/").partition("/")
        handlers: dict[str, Any] = {method: grpc.unary_unary_rpc_method_handler(late)}
        server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    async with AsyncExitStack() as stack:
        monkeypatch.setattr(MeshServer, "answer_at_once", register)
        _, client, counts = await stack.enter_async_context(counted(world))
        await counts.since()
        since = time.monotonic()
        answer = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
        assert answer.status_code == 200, answer.text
        assert 0.9 < time.monotonic() - since < 2.0
        assert await counts.since() == {ERROR: 1, STREAM: 1}
