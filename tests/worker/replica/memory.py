"""What a replica of the real model holds, beside what is booked for it: shared by a test and a benchmark."""

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil
from google.api.httpbody_pb2 import HttpBody

from helios.api.inference.v1 import openai_service_pb2_grpc
from helios.proxy.catalogue import ModelEntry
from helios.proxy.settings import ProxySettings
from helios.proxy.sizing import ReplicaSize, replica_size
from helios.registry.profile import ModelProfile, build_profile
from helios.registry.safetensors_header import header_length, parse_header
from helios.worker.replica.settings import EngineSettings, LoraAdapter, LoraSettings
from helios.worker.supervisor.measuring import private_bytes
from tests.worker.replica.generated import ALL_PRODUCTS, make_adapter
from tests.worker.replica.support import MODEL, Launcher, Leaves, RunningReplica, make_spec, wait_gone

MIB = 1 << 20
# Some 900 tokens, below the smallest context.
_PROMPT_WORDS = 900
SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """What a replica is started with: its KV cache and context, and its adapters' rank and number."""

    kv_cache_bytes: int
    context_tokens: int
    rank: int = 0
    adapter_count: int = 0

    @property
    def lora(self) -> LoraSettings | None:
        if not self.adapter_count:
            return None
        adapters = tuple(LoraAdapter(f"a{n}", f"a{n}", f"sha256:{n:064}") for n in range(self.adapter_count))
        return LoraSettings(adapters, self.rank, self.adapter_count)

    @property
    def document(self) -> str:
        """The settings as the proxy reads them."""
        lora = {"lora": {"max_rank": self.rank, "max_active_count": self.adapter_count}} if self.adapter_count else {}
        return json.dumps({"kv_cache_bytes": str(self.kv_cache_bytes)} | lora)


# KV cache and context: small, the default's lower bound, and more than the model's own context; then adapters.
CASES = {
    "64 MiB": Case(64 * MIB, 1024),
    "256 MiB": Case(256 * MIB, 2048),
    "512 MiB": Case(512 * MIB, 8192),
    "an adapter": Case(64 * MIB, 1024, rank=16, adapter_count=1),
    "four large adapters": Case(64 * MIB, 1024, rank=64, adapter_count=4),
}


def predicted(model: Path, case: Case) -> ReplicaSize:
    """Returns what the proxy books for the model in this case, by its own defaults."""
    profile = _profile(model)
    entry = ModelEntry(
        name=MODEL,
        revision="sha256:1",
        weights_bytes=profile.weights_bytes,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        max_context_tokens=profile.max_context_tokens,
        parameter_count=profile.parameter_count,
        dtype=profile.dtype,
        layer_count=profile.layer_count,
        vocabulary_size=profile.vocabulary_size,
        engine_settings=case.document,
    )
    return replica_size(entry, ProxySettings().core_policy().lifecycle.sizing)


def _profile(model: Path) -> ModelProfile:
    file = model / "model.safetensors"
    with file.open("rb") as weights:
        length = header_length(weights.read(8), file.stat().st_size, file.name)
        headers = {file.name: parse_header(weights.read(length), file.stat().st_size, file.name)}
    return build_profile(json.loads((model / "config.json").read_text()), headers)


def measure_ratio(launcher: Launcher, leaves: Leaves, model: Path, directory: Path, case: Case) -> float:
    """Starts a replica, has it work, and returns measured over booked memory; nothing of it is left then."""
    lora = case.lora
    adapters = lora.adapters if lora is not None else ()
    paths = {
        one.revision: str(make_adapter(model, directory / one.name, seed=n, rank=case.rank, products=ALL_PRODUCTS))
        for n, one in enumerate(adapters)
    }
    spec = make_spec(
        directory,
        leaves,
        engine="vllm",
        model_path=str(model),
        kv_cache_bytes=case.kv_cache_bytes,
        max_context_tokens=case.context_tokens,
        settings=EngineSettings(lora=lora),
        revision_paths=paths,
        supervisor_address="",
    )
    forked = launcher.fork(spec)
    replica = RunningReplica(launcher, leaves, spec, forked.pid, forked.start_ticks)
    try:
        token_count = case.kv_cache_bytes // _profile(model).kv_bytes_per_token
        names = [MODEL, *(one.name for one in adapters)]
        asyncio.run(_work(replica, prompt_count=token_count // _PROMPT_WORDS + 2, names=names))
        measured = private_bytes(process.pid for process in replica.tree())
    finally:
        processes: Sequence[psutil.Process] = replica.tree()
        os.kill(forked.pid, signal.SIGTERM)
        launcher.wait_exit(forked.pid, SECONDS)
        wait_gone(list(processes), 5)
    return measured / predicted(model, case).memory_bytes


async def _work(replica: RunningReplica, *, prompt_count: int, names: Sequence[str]) -> None:
    """Touches each block of the KV cache once, as a replica has after a while: it is booked whole, and taken as needed.

    Prompts differ from their first word on, so that no two of them share a block.
    """
    async with replica.leaves.dial(replica.address) as dialer, asyncio.TaskGroup() as group:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        for number in range(max(prompt_count, len(names))):
            name = names[number % len(names)]
            group.create_task(_ask(stub, name, f"{number} " + "word " * _PROMPT_WORDS))


async def _ask(stub: openai_service_pb2_grpc.OpenAIServiceStub, model: str, text: str) -> None:
    document = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 4, "ignore_eos": True}
    body = HttpBody(content_type="application/json", data=orjson.dumps(document))
    async for _ in stub.CreateChatCompletion(body, timeout=SECONDS, wait_for_ready=True):
        pass
