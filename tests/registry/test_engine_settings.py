"""Engine settings in the registry: their shape, how they are kept, and who is told."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helios.api.engine.v1 import engine_settings_pb2 as pb
from helios.mesh.errors import InvalidRequest, ModelNotFound, PermissionDenied
from helios.registry.client import EngineSettings, ModelUpserted, RegistryClient
from helios.registry.wire import engine_settings_from_proto, engine_settings_to_proto
from tests.registry.support import Mesh, Parts, serve
from tests.registry.test_catalog import next_of, revision

SETTINGS = pb.EngineSettings(
    dtype="float16",
    kv_cache_bytes=64 << 20,
    prefix_caching=False,
    cuda_graph_sizes=[1, 2],
    compilation=pb.COMPILATION_MODE_EAGER,
    speculative_decoding=pb.SpeculativeDecoding(method="ngram", token_count=3),
    options={"seed": "7"},
)


@pytest.fixture
async def client(parts: Parts, mesh: Mesh) -> AsyncIterator[RegistryClient]:
    async with serve(parts, mesh) as address, mesh.client(address) as opened:
        yield opened


def settings(**values: object) -> EngineSettings:
    return EngineSettings(json.dumps(values, sort_keys=True))


def test_the_wire_and_back_is_the_same_value() -> None:
    kept = engine_settings_from_proto(SETTINGS)
    assert engine_settings_to_proto(kept) == SETTINGS
    assert engine_settings_from_proto(engine_settings_to_proto(kept)) == kept
    # False is said, not left out: it is not the default.
    assert json.loads(kept.document)["prefix_caching"] is False


def test_what_a_newer_registry_kept_is_passed_over() -> None:
    assert engine_settings_to_proto(settings(dtype="auto", colour="blue")) == pb.EngineSettings(dtype="auto")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("engine", {"engine": "llama.cpp"}),
        ("dtype", {"dtype": "int8"}),
        ("quantization", {"quantization": "a b"}),
        ("tensor_parallel_size", {"tensor_parallel_size": 1025}),
        ("pipeline_parallel_size", {"pipeline_parallel_size": 5000}),
        ("kv_cache_bytes", {"kv_cache_bytes": "1023"}),
        ("max_running_requests", {"max_running_requests": 0}),
        ("cuda_graph_sizes", {"cuda_graph_sizes": [4, 2]}),
        ("cuda_graph_sizes", {"cuda_graph_sizes": [0, 2]}),
        ("speculative_decoding.method", {"speculative_decoding": {"token_count": 3}}),
        ("speculative_decoding.token_count", {"speculative_decoding": {"method": "ngram"}}),
        ("speculative_decoding.token_count", {"speculative_decoding": {"method": "ngram", "token_count": 65}}),
        ("lora.adapters[0].name", {"lora": {"adapters": [{"name": "../x", "model": "m"}]}}),
        ("lora.adapters[1].name", {"lora": {"adapters": [{"name": "x", "model": "m"}, {"name": "x", "model": "m"}]}}),
        ("lora.adapters[0].model", {"lora": {"adapters": [{"name": "x"}]}}),
        ("lora.adapters[0].revision", {"lora": {"adapters": [{"name": "x", "model": "m", "revision": "r"}]}}),
        ("chat_template", {"chat_template": "x" * (128 << 10) + "x"}),
        ("options", {"options": {"a b": "c"}}),
    ],
)
def test_a_setting_that_cant_be_is_named(field: str, values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settings(**values).check()
    assert (caught.value.reason, caught.value.metadata["param"]) == ("INVALID_ENGINE_SETTINGS", field)
    assert f"{field}: " in caught.value.message


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        settings(dtype="int8", max_batched_tokens=0, engine="x").check()
    assert caught.value.metadata["fields"] == "engine,dtype,max_batched_tokens"


async def test_settings_are_kept_and_told(client: RegistryClient, parts: Parts) -> None:
    await parts.catalog.put_model("m", ("alias",), revision("1"))
    watch = parts.catalog.watch()
    await next_of(watch)
    kept = engine_settings_from_proto(SETTINGS)
    assert (await client.update_engine_settings("alias", kept)).engine_settings == kept
    event = await next_of(watch)
    assert isinstance(event, ModelUpserted)
    assert event.model.engine_settings == kept
    await watch.aclose()
    # A new revision, said without settings, does not change them.
    assert (await parts.catalog.put_model("m", (), revision("2"))).engine_settings == kept
    assert (await client.get_model("m")).engine_settings == kept
    assert (await client.update_engine_settings("m", EngineSettings())).engine_settings == EngineSettings()
    with pytest.raises(ModelNotFound):
        await client.update_engine_settings("nobody", kept)


async def test_models_that_are_leant_on_must_exist(client: RegistryClient, parts: Parts) -> None:
    await parts.catalog.put_model("m", (), revision("1"))
    draft = settings(speculative_decoding={"method": "draft_model", "draft_model": "d", "token_count": 2})
    with pytest.raises(InvalidRequest, match=r"speculative_decoding.draft_model: there is no model 'd'"):
        await client.update_engine_settings("m", draft)
    await parts.catalog.put_model("d", (), revision("2"))
    assert (await client.update_engine_settings("m", draft)).engine_settings == draft
    with pytest.raises(InvalidRequest, match="is the model itself"):
        await client.update_engine_settings("d", draft)
    adapter = settings(lora={"adapters": [{"name": "d", "model": "d"}]})
    with pytest.raises(InvalidRequest, match=r"lora.adapters\[0\].name: 'd' is a model or an alias already"):
        await client.update_engine_settings("m", adapter)


async def test_an_ingest_brings_settings_along(client: RegistryClient, model_directory: Path) -> None:
    kept = settings(max_running_requests=3)
    events = [event async for event in client.ingest("m", str(model_directory), engine_settings=kept)]
    assert events[-1].model.engine_settings == kept  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match="dtype"):
        [event async for event in client.ingest("m", str(model_directory), engine_settings=settings(dtype="x"))]
    assert (await client.get_model("m")).engine_settings == kept


async def test_a_proxy_may_not_set_them(parts: Parts, mesh: Mesh) -> None:
    await parts.catalog.put_model("m", (), revision("1"))
    async with serve(parts, mesh) as address, mesh.client(address, "proxy") as proxy:
        with pytest.raises(PermissionDenied):
            await proxy.update_engine_settings("m", EngineSettings())
