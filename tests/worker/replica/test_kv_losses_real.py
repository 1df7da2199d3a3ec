"""A real engine with a small KV cache drops a prompt; a proxy's core hears of it and stops believing in it.

Only the two sessions between replica and proxy are left out (they have tests of their own): what the replica says goes
through the supervisor's feed and both sides' messages.
"""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.api.inference.v1 import inference_service_pb2_grpc, openai_service_pb2_grpc
from helios.api.worker.v1 import supervisor_service_pb2 as worker_pb
from helios.proxy.core import Core
from helios.proxy.fleet.wire import delta_from_proto as heard_by_proxy
from helios.proxy.routing.pick import Wishes
from helios.proxy.routing.prefix import Blocks, blocks_of
from helios.proxy.routing.table import Candidate
from helios.proxy.traffic import Traffic
from helios.worker.supervisor.fleet import FleetFeed
from helios.worker.supervisor.outbox import LoadReport, Outbox
from helios.worker.supervisor.records import WorkerView
from helios.worker.supervisor.wire import delta_from_proto, delta_to_proto
from tests.proxy.support import core, entry, hello, replica
from tests.worker.replica.support import MODEL, Launcher, Leaves, RecordingSupervisor, RunningReplica, make_spec

pytestmark = pytest.mark.real_model

SECONDS = 60.0
# Some 2,100 tokens of this model: three prompts.
KV_CACHE_BYTES = 48 << 20
OTHERS = ("pear", "plum", "cherry", "grape", "lemon", "melon")


@pytest.fixture
def small(launcher: Launcher, leaves: Leaves, tmp_path: Path, smollm2_directory: Path) -> Iterator[RunningReplica]:
    """A replica that forgets soon."""
    spec = make_spec(
        tmp_path,
        leaves,
        replica_id="r0",
        engine="vllm",
        model_path=str(smollm2_directory),
        kv_cache_bytes=KV_CACHE_BYTES,
        max_context_tokens=2048,
    )
    forked = launcher.fork(spec)
    running = RunningReplica(launcher, leaves, spec, forked.pid, forked.start_ticks)
    try:
        yield running
    finally:
        os.kill(running.pid, signal.SIGTERM)
        assert launcher.wait_exit(running.pid, 20).status == 0


@pytest.fixture
async def native(small: RunningReplica) -> AsyncIterator[inference_service_pb2_grpc.InferenceServiceStub]:
    async with small.leaves.dial(small.address) as dialer:
        yield dialer.stub(inference_service_pb2_grpc.InferenceServiceStub)


@pytest.fixture
async def openai(small: RunningReplica) -> AsyncIterator[openai_service_pb2_grpc.OpenAIServiceStub]:
    async with small.leaves.dial(small.address) as dialer:
        yield dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)


def text_of(topic: str) -> str:
    """Some 650 tokens."""
    return " ".join(f"{topic} {number}" for number in range(130))


def blocks(topic: str) -> Blocks:
    return blocks_of(text_of(topic).encode(), "m")


class Gateway:
    """A proxy's core that knows the real replica and an imaginary one beside it."""

    def __init__(self, supervisor: RecordingSupervisor) -> None:
        self.core: Core = core()
        self._model = entry("m", min_replicas=2)
        self.core.models_replaced([self._model], 0.0, is_synced=True)
        for number in (0, 1):
            held = replica(f"r{number}", worker_id=f"w{number}", address=f"127.0.0.1:{1000 + number}")
            self.core.worker_hello(hello(held.worker_id, replicas=(held,)), 0.0)
        self.core.endpoints_acknowledged(self.core.fleet.endpoints(), 0.0)
        self._supervisor = supervisor
        self._taken = self._picked = 0

    @property
    def traffic(self) -> Traffic:
        return self.core.traffic

    def pick(self, topic: str) -> tuple[Candidate, ...]:
        """Picks for a request with a prompt; it never arrives, so it counts as on its way to the best one."""
        self._picked += 1
        chosen = self.traffic.pick(self._model, f"q{self._picked}", 0.0, None, Wishes(blocks(topic)))
        assert chosen is not None
        return tuple(chosen.choices)

    def sent(self, request_id: str, topic: str) -> None:
        self.traffic.prompt_sent(self._model, "r0", request_id, blocks(topic))

    def hear(self, feed: FleetFeed, outbox: Outbox) -> None:
        """Hears what the replica has said since the last time."""
        said, self._taken = self._supervisor.heard[self._taken :], len(self._supervisor.heard)
        for request in said:
            if request.HasField("load"):
                feed.report(delta_from_proto(request.load))
        reports = [message for message in outbox.take(is_load_due=True) if isinstance(message, LoadReport)]
        for report in reports:
            self.core.load_report([heard_by_proxy(delta_to_proto(delta)) for delta in report.deltas], 0.0)


async def ask(native: Any, request_id: str, topic: str) -> None:
    request = pb.CompleteRequest(
        model=MODEL, text=text_of(topic), sampling=pb.SamplingParameters(max_tokens=1, ignore_eos=True)
    )
    metadata = (("x-request-id", request_id),)
    async for _ in native.Complete(request, metadata=metadata, timeout=SECONDS, wait_for_ready=True):
        pass


async def ask_openai(openai: Any, request_id: str, topic: str) -> None:
    document = {"model": MODEL, "prompt": text_of(topic), "max_tokens": 1, "n": 2, "temperature": 1}
    body = HttpBody(content_type="application/json", data=orjson.dumps(document))
    metadata = (("x-request-id", request_id),)
    async for _ in openai.CreateCompletion(body, metadata=metadata, timeout=SECONDS, wait_for_ready=True):
        pass


async def test_a_prompt_that_the_engine_dropped_draws_nothing_to_its_replica_any_more(
    small: RunningReplica,
    native: inference_service_pb2_grpc.InferenceServiceStub,
    openai: openai_service_pb2_grpc.OpenAIServiceStub,
) -> None:
    # Nobody begins a session here later than the engine.
    feed = FleetFeed(lambda: WorkerView("w", "1", "node", "0", (), (), 1, ()))
    with feed.subscribe(lambda _: None) as (_, outbox):
        async with small.supervisor() as supervisor:
            gateway = Gateway(supervisor)
            gateway.sent("first", "apple")
            # By vLLM's own serving code; the others go by the engine directly.
            await ask_openai(openai, "first", "apple")
            gateway.hear(feed, outbox)
            best, other = gateway.pick("apple")
            assert (best.replica_id, best.prefix_score, other.prefix_score) == ("r0", 1.0, 0.0)
            for topic in OTHERS:
                await ask(native, f"another proxy's {topic}", topic)
            gateway.sent("last", "fig")
            await ask(native, "last", "fig")
            await supervisor.wait_heard(lambda said: is_lost("first", said), SECONDS)
            gateway.hear(feed, outbox)
            # The other one, since a request is on its way to this one.
            best, other = gateway.pick("apple")
            assert (best.replica_id, best.prefix_score, other.prefix_score) == ("r1", 0.0, 0.0)
            best, _ = gateway.pick("fig")
            assert (best.replica_id, best.prefix_score) == ("r0", 1.0)
            tally = gateway.traffic.corrections.take_tally()
            assert (tally.losses >= 1, tally.blocks, tally.emptied) == (True, len(blocks("apple")), 0)
    async with small.supervisor() as supervisor:
        # To a supervisor that begins anew everything is told again, with the first load.
        first = await supervisor.wait_heard(lambda said: said.HasField("load"), SECONDS)
        assert is_lost("first", first)


def is_lost(request_id: str, said: worker_pb.AttachRequest) -> bool:
    """Whether a replica says that it has nothing of a prompt any more."""
    losses = said.load.kv_cache.losses
    return any(loss.request_id == request_id and not loss.kept_tokens for loss in losses)
