"""What a replica of the real model holds, beside what is booked for it: shared by a test and a benchmark."""

import asyncio
import json
import os
import signal
from collections.abc import Sequence
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
from helios.worker.supervisor.measuring import private_bytes
from tests.worker.replica.support import MODEL, Launcher, Leaves, RunningReplica, make_spec, wait_gone

MIB = 1 << 20
# KV cache and context: small, the default's lower bound, and more than the model's own context.
SIZES = ((64 * MIB, 1024), (256 * MIB, 2048), (512 * MIB, 8192))
# Some 900 tokens, below the smallest context.
_PROMPT_WORDS = 900
SECONDS = 120.0


def predicted(model: Path, kv_cache_bytes: int) -> ReplicaSize:
    """Returns what the proxy books for the model with so much KV cache, by its own defaults."""
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
        engine_settings=json.dumps({"kv_cache_bytes": str(kv_cache_bytes)}),
    )
    return replica_size(entry, ProxySettings().core_policy().lifecycle.sizing)


def _profile(model: Path) -> ModelProfile:
    file = model / "model.safetensors"
    with file.open("rb") as weights:
        length = header_length(weights.read(8), file.stat().st_size, file.name)
        headers = {file.name: parse_header(weights.read(length), file.stat().st_size, file.name)}
    return build_profile(json.loads((model / "config.json").read_text()), headers)


def measure_ratio(launcher: Launcher, leaves: Leaves, model: Path, directory: Path, size: tuple[int, int]) -> float:
    """Starts a replica, has it work, and returns measured over booked memory; nothing of it is left then."""
    kv_cache_bytes, context_tokens = size
    spec = make_spec(
        directory,
        leaves,
        engine="vllm",
        model_path=str(model),
        kv_cache_bytes=kv_cache_bytes,
        max_context_tokens=context_tokens,
        supervisor_address="",
    )
    forked = launcher.fork(spec)
    replica = RunningReplica(launcher, leaves, spec, forked.pid, forked.start_ticks)
    try:
        token_count = kv_cache_bytes // _profile(model).kv_bytes_per_token
        asyncio.run(_work(replica, prompt_count=token_count // _PROMPT_WORDS + 2))
        measured = private_bytes(process.pid for process in replica.tree())
    finally:
        processes: Sequence[psutil.Process] = replica.tree()
        os.kill(forked.pid, signal.SIGTERM)
        launcher.wait_exit(forked.pid, SECONDS)
        wait_gone(list(processes), 5)
    return measured / predicted(model, kv_cache_bytes).memory_bytes


async def _work(replica: RunningReplica, *, prompt_count: int) -> None:
    """Touches each block of the KV cache once, as a replica has after a while: it is booked whole, and taken as needed.

    Prompts differ from their first word on, so that no two of them share a block.
    """
    async with replica.leaves.dial(replica.address) as dialer, asyncio.TaskGroup() as group:
        stub = dialer.stub(openai_service_pb2_grpc.OpenAIServiceStub)
        for number in range(prompt_count):
            group.create_task(_ask(stub, f"{number} " + "word " * _PROMPT_WORDS))


async def _ask(stub: openai_service_pb2_grpc.OpenAIServiceStub, text: str) -> None:
    document = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4, "ignore_eos": True}
    body = HttpBody(content_type="application/json", data=orjson.dumps(document))
    async for _ in stub.CreateChatCompletion(body, timeout=SECONDS, wait_for_ready=True):
        pass
