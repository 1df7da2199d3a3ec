"""What the proxy makes of a model's engine settings: sizes, start commands, and starts that can't ever succeed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helios.api.engine.v1 import engine_settings_pb2
from helios.mesh.errors import NoReadyReplica, PreconditionFailed
from helios.proxy import actions
from helios.proxy.catalogue import Catalogue
from helios.proxy.core import Core
from helios.proxy.engine_needs import EngineNeeds, needs_of
from helios.proxy.fleet.commands import Command, StartReplica, UnstageRevision
from helios.proxy.fleet.state import (
    Device,
    DeviceKind,
    Replica,
    ReplicaState,
    Staged,
    StagedState,
    WorkerHello,
)
from helios.proxy.fleet.wire import command_to_proto
from helios.proxy.sizing import GIVEN, MeasuredSizes, SizingPolicy, replica_size
from helios.proxy.store import Store, load_models
from tests.proxy.support import GIB, MIB, core, entry, hello, ready, replica
from tests.proxy.test_core import sent

SIZING = SizingPolicy(overhead_bytes=GIB, context_count=2, min_kv_cache_bytes=MIB, max_kv_cache_bytes=GIB)


def settings(**values: object) -> str:
    return json.dumps(values, sort_keys=True)


def size_of(**values: object) -> tuple[int, int]:
    model = replace(
        entry(engine_settings=settings(**values)), weights_bytes=GIB, kv_bytes_per_token=MIB, dtype="bfloat16"
    )
    size = replica_size(model, SIZING)
    return size.memory_bytes - size.kv_cache_bytes, size.kv_cache_bytes


def test_sizes_follow_the_settings() -> None:
    assert size_of() == (2 * GIB, 2 * GIB), "one full context, above the bound"
    assert size_of(max_context_tokens=256) == (2 * GIB, 512 * MIB)
    assert size_of(kv_cache_bytes=str(100 * MIB)) == (2 * GIB, 100 * MIB)
    assert size_of(kv_cache_bytes=str(MIB + 1)) == (2 * GIB, 2 * MIB)
    assert size_of(dtype="float32", max_context_tokens=256) == (3 * GIB, GIB)
    assert size_of(kv_cache_dtype="fp8", max_context_tokens=256) == (2 * GIB, 256 * MIB)
    assert size_of(dtype="float32", kv_cache_dtype="bfloat16", max_context_tokens=256) == (3 * GIB, 512 * MIB)
    assert size_of(tensor_parallel_size=2, pipeline_parallel_size=2, max_context_tokens=1) == (5 * GIB, 2 * MIB)


SMOL = replace(
    entry(),
    weights_bytes=269_030_016,
    kv_bytes_per_token=23040,
    parameter_count=134_515_008,
    dtype="bfloat16",
    layer_count=30,
    vocabulary_size=49152,
)


def smol_items(*, is_gpu: bool = False, **values: object) -> tuple[dict[str, int], dict[str, int]]:
    size = replica_size(replace(SMOL, engine_settings=settings(**values)), SIZING, is_gpu=is_gpu)
    assert size.memory_bytes == sum(bytes_ for _, bytes_ in size.items)
    return dict(size.items), dict(size.host_items)


def test_room_for_adapters_is_booked_before_there_is_one() -> None:
    lora = {"max_rank": 64, "max_active_count": 4}
    plain, _ = smol_items()
    assert not {"ADAPTERS", "HOST_ADAPTERS", "KV_OFFLOAD"} & plain.keys()
    items, host = smol_items(lora=lora)
    assert host == {}, "a CPU's device is the host"
    on_gpu, gpu_host = smol_items(is_gpu=True, lora=lora)
    # What vLLM's own buffers add up to for this model: 197.6 MiB.
    assert on_gpu["ADAPTERS"] == pytest.approx(197.6 * MIB, rel=0.03)
    # Without the vocabulary's, which a CPU never touches: seven products of a guessed width.
    assert items["ADAPTERS"] == pytest.approx(on_gpu["ADAPTERS"] - 2 * (49_152 + 576) * 64 * 4 * 2, rel=0.02)
    assert items["HOST_ADAPTERS"] == items["ADAPTERS"], "as many are loaded as there are buffers"
    assert gpu_host == {"HOST_ADAPTERS": items["HOST_ADAPTERS"]}
    assert "HOST_ADAPTERS" not in on_gpu
    wide, _ = smol_items(dtype="float32", lora=lora)
    assert wide["ADAPTERS"] == pytest.approx(2 * items["ADAPTERS"], rel=0.01)
    two, host = smol_items(is_gpu=True, lora=lora, tensor_parallel_size=2)
    assert on_gpu["ADAPTERS"] < two["ADAPTERS"] < 2 * on_gpu["ADAPTERS"], "ranks share some of it"
    assert host["HOST_ADAPTERS"] == 2 * items["HOST_ADAPTERS"], "and keep adapters each for itself"
    least, _ = smol_items(lora={"adapters": [{"name": "x", "model": "a"}]})
    assert least["ADAPTERS"] == pytest.approx(items["ADAPTERS"] / 16, rel=0.1), "rank 16, one at a time"


def test_kv_blocks_in_host_memory_are_booked_where_the_device_is_another() -> None:
    said = {"host_bytes": str(GIB), "disk_bytes": str(GIB)}
    _, host = smol_items(is_gpu=True, kv_offload=said)
    assert host == {"KV_OFFLOAD": GIB}
    assert smol_items(kv_offload=said) == smol_items(), "the worker refuses that on a CPU, and says why"


def test_what_was_given_is_booked_whole_whatever_a_young_replica_was_measured_to_hold() -> None:
    model = replace(SMOL, engine_settings=settings(lora={"max_rank": 64, "max_active_count": 4}))
    first = replica_size(model, SIZING)
    measured = MeasuredSizes()
    given = sum(bytes_ for kind, bytes_ in first.items if kind in GIVEN)
    measured.record(model.revision, model.engine_settings, measured_bytes=300 * MIB, given_bytes=given)
    next_one = dict(replica_size(model, SIZING, measured=measured).items)
    for kind in GIVEN:
        assert next_one[kind] == dict(first.items)[kind]


def gpu_worker(host_bytes: int, *replicas: Replica, staged: tuple[Staged, ...] = ()) -> WorkerHello:
    device = Device("cuda:0", DeviceKind.CUDA, 80 * GIB, 0)
    own = hello(replicas=replicas)
    return replace(own, devices=(device,), host_memory_bytes=host_bytes, staged=staged)


def test_host_memory_beside_a_gpu_is_never_promised_twice() -> None:
    subject = core()
    said = settings(kv_offload={"host_bytes": str(4 * GIB)})
    subject.models_replaced(
        [entry(engine_settings=said), entry("n", revision="sha256:2", engine_settings=said)], 0.0, is_synced=True
    )
    staged = Staged("sha256:9", "old", StagedState.STAGED, "w", memory_bytes=2 * GIB)
    subject.worker_hello(gpu_worker(5 * GIB, staged=(staged,)), 0.0)
    found = subject.catalogue.find("m")
    assert found is not None
    _, todo = subject.hold(found, "q", size_bytes=0, deadline=99.0, now=1.0)
    unstage, start = sent(todo)
    assert unstage == UnstageRevision("sha256:9"), "staged weights give way"
    assert isinstance(start, StartReplica)
    assert start.host_memory_items == (("KV_OFFLOAD", 4 * GIB),)
    message = command_to_proto(Command("c", "w", start)).command.start
    assert [(item.kind, item.size_bytes) for item in message.host_memory_items] == [(8, 4 * GIB)]
    other = subject.catalogue.find("n")
    assert other is not None
    _, todo = subject.hold(other, "q2", size_bytes=0, deadline=99.0, now=2.0)
    (failed,) = [action for action in todo if isinstance(action, actions.Fail)]
    assert failed.error.reason == "NO_CAPACITY"
    assert "4.0 GiB of host memory" in failed.error.message


def test_quantised_weights_keep_their_size_whatever_the_activations_are() -> None:
    needs = EngineNeeds(dtype="float32")
    assert needs.weights_bytes(100, "int8") == 100
    assert needs.weights_bytes(100, "float16") == 200
    assert EngineNeeds(dtype="bfloat16").weights_bytes(100, "float32") == 50


def test_a_draft_model_is_booked_with_its_model() -> None:
    draft = replace(entry("d"), weights_bytes=GIB, kv_bytes_per_token=MIB)
    plain = replica_size(entry(), SIZING)
    assert replica_size(entry(), SIZING, draft).memory_bytes == plain.memory_bytes + GIB + 2048 * MIB - MIB


def test_settings_that_say_nothing_change_nothing() -> None:
    assert needs_of("") == needs_of("{}") == needs_of('{"a newer field": 1}') == EngineNeeds()


def start_of(subject: Core, name: str = "m") -> StartReplica:
    found = subject.catalogue.find(name)
    assert found is not None
    _, todo = subject.hold(found, "q", size_bytes=0, deadline=99.0, now=1.0)
    (order,) = sent(todo)
    assert isinstance(order, StartReplica)
    return order


def test_a_start_carries_settings_and_aliases() -> None:
    subject = core()
    said = settings(
        engine="vllm",
        dtype="float16",
        kv_cache_bytes=str(64 * MIB),
        max_context_tokens=512,
        prefix_caching=False,
        speculative_decoding={"method": "draft_model", "draft_model": "d", "token_count": 2},
        lora={"adapters": [{"name": "x", "model": "a"}]},
    )
    models = [
        entry(engine_settings=said, aliases=("one", "two")),
        entry("d", revision="sha256:d"),
        entry("a", revision="sha256:a"),
    ]
    subject.models_replaced(models, 0.0, is_synced=True)
    subject.worker_hello(hello(), 0.0)
    order = start_of(subject)
    message = command_to_proto(Command("c", "w", order)).command.start
    assert (message.engine, message.kv_cache_bytes, message.max_context_tokens) == ("vllm", 64 * MIB, 512)
    assert list(message.served_names) == ["one", "two"]
    assert message.engine_settings == engine_settings_pb2.EngineSettings(
        engine="vllm",
        dtype="float16",
        kv_cache_bytes=64 * MIB,
        max_context_tokens=512,
        prefix_caching=False,
        speculative_decoding=engine_settings_pb2.SpeculativeDecoding(
            method="draft_model", draft_model="d", token_count=2, draft_revision="sha256:d"
        ),
        lora=engine_settings_pb2.LoraSettings(
            adapters=[engine_settings_pb2.LoraAdapter(name="x", model="a", revision="sha256:a")]
        ),
    )


def test_changed_settings_leave_running_replicas_alone_and_hold_for_the_next() -> None:
    subject = core()
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello(replicas=(replica(),)), 0.0)
    changed = entry(engine_settings=settings(max_running_requests=2))
    assert sent(subject.model_upserted(changed, 1.0)) == []
    subject.hold(changed, "q", size_bytes=0, deadline=99.0, now=1.5)
    (order,) = sent(subject.replica_event("w", 1, replica(state=ReplicaState.STOPPED), 2.0))
    assert isinstance(order, StartReplica)
    assert order.engine_settings == changed.engine_settings


def fail(subject: Core, order: StartReplica, reason: str, now: float) -> list[actions.Action]:
    failed = replace(
        replica(order.replica_id, state=ReplicaState.FAILED), failure_reason=reason, failure_message="no such thing"
    )
    return subject.replica_event("w", int(now), failed, now)


@pytest.mark.parametrize("reason", ["INVALID_ENGINE_SETTINGS", "UNSUPPORTED_ARCHITECTURE", "BAD_CHECKPOINT"])
def test_a_start_that_cant_ever_succeed_is_answered_at_once_and_not_repeated(reason: str) -> None:
    subject = core()
    subject.models_replaced([entry(min_replicas=1)], 0.0, is_synced=True)
    (order,) = sent(subject.worker_hello(hello(), 0.0))
    assert isinstance(order, StartReplica)
    subject.hold(entry(min_replicas=1), "q", size_bytes=0, deadline=99.0, now=1.0)
    (failed,) = [action for action in fail(subject, order, reason, 2.0) if isinstance(action, actions.Fail)]
    assert isinstance(failed.error, PreconditionFailed)
    assert (failed.error.reason, failed.error.http_status) == (reason, 400)
    assert "the model 'm' can't be started: no such thing" in failed.error.message
    assert failed.error.retry_after_seconds is None
    for now in range(3, 120):
        subject.worker_seen("w", float(now))
        assert sent(subject.tick(float(now))) == []
    _, todo = subject.hold(entry(min_replicas=1), "q2", size_bytes=0, deadline=999.0, now=121.0)
    (again,) = [action for action in todo if isinstance(action, actions.Fail)]
    assert again.error.message == failed.error.message
    # What stood in the way may be gone when the model is another one.
    changed = entry(min_replicas=1, engine_settings=settings(dtype="float32"))
    (order,) = sent(subject.model_upserted(changed, 122.0))
    assert isinstance(order, StartReplica)
    done = subject.replica_event("w", 200, ready(replica(order.replica_id, state=ReplicaState.LOADING)), 123.0)
    told = actions.Send | actions.ReplicaChanged | actions.StartScored
    assert [type(action) for action in done if not isinstance(action, told)] == [actions.ActivationDone]


def test_an_operator_may_try_again() -> None:
    subject = core()
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello(), 0.0)
    fail(subject, start_of(subject), "UNSUPPORTED_ARCHITECTURE", 2.0)
    assert [type(order) for order in sent(subject.preload(entry(), 3.0))] == [StartReplica]


def test_out_of_memory_is_tried_again_after_a_pause() -> None:
    subject = core()
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello(), 0.0)
    (failed,) = [
        action for action in fail(subject, start_of(subject), "OUT_OF_MEMORY", 2.0) if isinstance(action, actions.Fail)
    ]
    assert isinstance(failed.error, NoReadyReplica)
    assert "no such thing" in failed.error.message
    assert failed.error.retry_after_seconds == pytest.approx(1.0)


def test_settings_that_name_a_missing_model_fail_for_good() -> None:
    subject = core()
    said = settings(speculative_decoding={"method": "draft_model", "draft_model": "gone", "token_count": 2})
    subject.models_replaced([entry(engine_settings=said)], 0.0, is_synced=True)
    subject.worker_hello(hello(), 0.0)
    _, todo = subject.hold(entry(engine_settings=said), "q", size_bytes=0, deadline=99.0, now=1.0)
    (failed,) = [action for action in todo if isinstance(action, actions.Fail)]
    assert (failed.error.reason, failed.error.http_status) == ("INVALID_ENGINE_SETTINGS", 400)
    assert "'gone'" in failed.error.message


async def test_settings_outlive_a_restart(tmp_path: Path) -> None:
    catalogue = Catalogue()
    catalogue.replace([entry(engine_settings=settings(dtype="float32"))])
    await Store(tmp_path, catalogue).write_models()
    assert load_models(tmp_path) == catalogue.models()


def lora(*adapters: str) -> str:
    return settings(lora={"adapters": [{"name": name, "model": f"{name}-lora"} for name in adapters]})


def test_an_adapter_is_answered_by_the_model_that_names_it() -> None:
    catalogue = Catalogue()
    catalogue.replace(
        [entry("base", engine_settings=lora("pirate", "poet")), replace(entry("pirate-lora"), base_model="x")]
    )
    found = catalogue.find("pirate")
    assert found is not None
    assert (found.name, found.adapters) == ("base", ("pirate", "poet"))
    catalogue.upsert(entry("base", engine_settings=lora("poet")))
    assert catalogue.find("pirate") is None
    catalogue.delete("base")
    assert catalogue.find("poet") is None


def test_an_adapter_s_own_name_means_the_model_that_names_it() -> None:
    catalogue = Catalogue()
    said = settings(lora={"adapters": [{"name": "pirate", "model": "pirate"}]})
    adapter = replace(entry("pirate"), base_model="x")
    catalogue.replace([adapter, entry("base", engine_settings=said)])
    found = catalogue.find("pirate")
    assert found is not None
    assert found.name == "base"
    assert catalogue.get("pirate") == adapter


def test_a_decode_model_s_requests_name_a_replica_that_computes_prompts() -> None:
    subject = core()
    decode = entry(engine_settings=settings(role="DISAGGREGATION_ROLE_DECODE"))
    prefill = entry("p", engine_settings=settings(role="DISAGGREGATION_ROLE_PREFILL"))
    stale = entry("q", revision="sha256:2", engine_settings=settings(role="DISAGGREGATION_ROLE_PREFILL"))
    subject.models_replaced([decode, prefill, stale, entry("both")], 0.0, is_synced=True)
    subject.worker_hello(hello(replicas=(ready(replica("d"), "1:1"),)), 0.0)
    subject.endpoints_acknowledged(frozenset({"1:1", "1:2"}), 1.0)
    chosen = subject.pick(decode, "r1", 2.0)
    assert chosen is not None
    assert subject.prefill_endpoint(decode, chosen, 2.0) == "", "none yet, and nobody waits"
    (start,) = [order for order in sent(subject.tick(3.0)) if isinstance(order, StartReplica)]
    assert start.model == "p", "a model that computes prompts is in use while the one that decodes is"
    started = ready(replica(start.replica_id, model="p"), "1:2")
    subject.replica_event("w", 1, started, 4.0)
    assert subject.prefill_endpoint(decode, chosen, 5.0) == "1:2"
    assert subject.prefill_endpoint(entry("both"), chosen, 5.0) == ""
