"""What revisions need of devices: shapes of all kinds, splits as vLLM has them, fits that add up, plans, measures."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import InvalidRequest, PermissionDenied, PreconditionFailed
from helios.registry.client import ProfileClient
from helios.registry.names import Reference
from helios.registry.profile import ModelProfile
from helios.registry.profiles.fits import (
    DEVICES,
    fits_of,
    kv_rank_bytes,
    pipeline_parallel_options,
    rank_bytes,
    tensor_parallel_options,
)
from helios.registry.profiles.measure import Measure
from helios.registry.profiles.planner import Plan, Planner
from helios.registry.profiles.shape import Layout, Shape, layout_of, shape_of
from helios.registry.profiles.splits import Splits, known_classes
from helios.registry.safetensors_header import SafetensorsHeader, Tensor
from helios.registry.sources.architectures import known_architectures
from helios.registry.sources.conversion import environment_of
from tests.registry import tiny
from tests.registry.support import Mesh, Parts, serve
from tests.registry.test_ingest import write_adapter
from tests.worker.engines import splits

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
# 640 GB, of which no 16 ranks are needed at most.
BIG = Layout(blocks=(8 * GIB,) * 32, embedding_bytes=GIB, head_bytes=GIB, other_bytes=0, by_dtype=())
BASE: dict[str, Any] = {
    "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "bfloat16"
}  # fmt: skip
# Numbers of the models' own config.json files, as far as splitting them goes.
CONFIGS: dict[str, dict[str, Any]] = {
    "many heads": BASE | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
    },
    "grouped": BASE | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    },
    "tied, odd": BASE | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "experts": BASE | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "latent": BASE | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_hidden_layers": 27, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None, "vocab_size": 102400,
    },
    "quantised": BASE | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    },
}  # fmt: skip
TENSOR_PARALLEL = {
    "many heads": (1, 2, 4, 8, 16),
    "grouped": (1, 2, 4, 8, 16),
    "tied, odd": (1, 3),
    "experts": (1, 2, 4, 8, 16),
    "latent": (1, 2, 4, 8, 16),
    "quantised": (1, 2, 4),
}
# Asks vLLM itself which splits its configuration takes; a process of its own keeps vLLM out of this one.
ASK_VLLM = """
import json, sys
from vllm.config import ModelConfig, ParallelConfig
found = {}
for name, path in json.load(sys.stdin).items():
    model = ModelConfig(model=path, skip_tokenizer_init=True, dtype="bfloat16")
    found[name] = []
    for ranks in range(1, 17):
        parallel = ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="mp")
        try:
            model.verify_with_parallel_config(parallel)
        except ValueError:
            continue
        found[name].append([ranks, model.get_num_kv_heads(parallel), model.get_total_num_kv_heads()])
print("FOUND", json.dumps(found))
"""


def profile_of(config: Mapping[str, Any]) -> ModelProfile:
    return ModelProfile(
        config["architectures"][0], 1, 1, "bfloat16", 4, 4096, config["num_hidden_layers"], config["vocab_size"]
    )


def shape(name: str) -> Shape:
    return shape_of(CONFIGS[name], profile_of(CONFIGS[name]))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_layers_split_as_heads_widths_and_vocabulary_let_them(name: str) -> None:
    assert tensor_parallel_options(shape(name)) == TENSOR_PARALLEL[name]


def test_vllm_takes_every_split_that_is_offered_and_refuses_no_other_but_for_what_its_layers_say(
    tmp_path: Path,
) -> None:
    paths = {}
    for name, config in CONFIGS.items():
        directory = tmp_path / name.replace(" ", "_")
        directory.mkdir()
        # What it says of the kernels' hardware is no matter of splits; and vLLM takes ten seconds to look at a class,
        # so one stands for all: heads and layers are read from the configuration of each.
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        (directory / "config.json").write_text(json.dumps(plain | {"architectures": ["LlamaForCausalLM"]}))
        paths[name] = str(directory)
    asked = subprocess.run(
        [sys.executable, "-c", ASK_VLLM],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    line = next((line for line in asked.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line is not None, asked.stderr[-2000:]
    for name, taken in json.loads(line.removeprefix("FOUND ")).items():
        ours, wanted = shape(name), CONFIGS[name]
        theirs = {ranks for ranks, _, _ in taken}
        assert set(tensor_parallel_options(ours)) <= theirs, name
        for ranks in theirs - set(tensor_parallel_options(ours)):
            # Its configuration passes them, its layers assert: neither heads of keys nor widths come out even.
            is_uneven = wanted["num_key_value_heads"] % ranks and ranks % wanted["num_key_value_heads"]
            widths = (wanted["intermediate_size"], wanted.get("moe_intermediate_size", ranks))
            assert is_uneven or any(width % ranks for width in widths) or wanted["vocab_size"] % ranks, (name, ranks)
        for ranks, kv_heads, _ in taken:
            if ranks in tensor_parallel_options(ours) and not ours.is_latent:
                assert kv_heads == max(1, ours.kv_head_count // ranks)


def header(*tensors: tuple[str, str, int]) -> SafetensorsHeader:
    """A header with tensors of one dimension: name, type, and so many bytes."""
    width = {"BF16": 2, "F8_E4M3": 1, "I32": 4, "F32": 4}
    found, begin = [], 0
    for name, dtype, size in tensors:
        found.append(Tensor(name, dtype, (size // width[dtype],), begin, begin + size))
        begin += size
    return SafetensorsHeader(tuple(found), {})


def test_bytes_are_the_blocks_the_embeddings_the_head_and_the_rest() -> None:
    layout = layout_of(
        [
            header(
                ("model.embed_tokens.weight", "BF16", 100),
                ("model.layers.0.self_attn.q_proj.weight", "F8_E4M3", 50),
                ("model.layers.0.self_attn.q_proj.weight_scale", "F32", 4),
                ("model.layers.10.mlp.experts.3.w1.weight", "I32", 40),
            ),
            header(
                ("model.layers.2.mlp.gate.weight", "BF16", 6),
                ("model.norm.weight", "BF16", 2),
                ("lm_head.weight", "BF16", 100),
                ("vision_tower.encoder.layers.0.weight", "BF16", 8),
            ),
        ]
    )
    # By number, and not by the order of names.
    assert layout.blocks == (54, 6, 40)
    assert (layout.embedding_bytes, layout.head_bytes, layout.other_bytes) == (100, 100, 10)
    assert not layout.is_tied
    assert layout.total_bytes == 310
    assert layout.by_dtype == (("BF16", 216), ("F32", 4), ("F8_E4M3", 50), ("I32", 40))


def test_stages_carry_what_is_theirs() -> None:
    layout = Layout(blocks=(10, 10, 10, 10, 10), embedding_bytes=8, head_bytes=0, other_bytes=1, by_dtype=())
    assert layout.is_tied
    assert rank_bytes(layout, 1, 1) == 59
    # vLLM gives what is left over to the stages before the last: 3 layers and the embeddings, 2 and their copy.
    assert rank_bytes(layout, 1, 2) == 39
    assert rank_bytes(layout, 2, 2) == 20
    assert pipeline_parallel_options(Shape(4, 4, 5, 64, 8)) == (1, 2, 4)


@pytest.mark.parametrize(
    ("architecture", "has_ranks", "has_stages"),
    [
        ("LlamaForCausalLM", True, True),
        ("MixtralForCausalLM", True, True),
        # Of its own, and without SupportsPP.
        ("BertModel", True, False),
        ("WhisperForConditionalGeneration", True, False),
        # Converted from a class that has it.
        ("Qwen2ForSequenceClassification", True, True),
        ("Nobody knows it", True, False),
    ],
)
def test_a_model_is_split_as_its_class_can_be(architecture: str, *, has_ranks: bool, has_stages: bool) -> None:
    config = CONFIGS["grouped"] | {"architectures": [architecture]}
    found = shape_of(config, profile_of(config))
    assert (len(tensor_parallel_options(found)) > 1) == has_ranks
    assert pipeline_parallel_options(found) == ((1, 2, 4, 8, 16) if has_stages else (1,))
    fits = fits_of(found, BIG, kv_bytes_per_token=1 << 17, max_context_tokens=8192)
    assert has_stages or {fit.pipeline_parallel for fit in fits} == {1}


def test_layers_without_a_plan_for_ranks_stay_whole() -> None:
    whole = Shape(8, 8, 8, 6400, 64, splits=Splits(has_ranks=False, has_stages=True))
    assert tensor_parallel_options(whole) == (1,)
    assert pipeline_parallel_options(whole) == (1, 2, 4, 8)


def test_every_class_that_is_taken_is_in_the_table_of_splits() -> None:
    """Where this fails after an upgrade: `python -m tests.worker.engines.splits` writes the table anew."""
    assert known_classes() == known_architectures()


@pytest.mark.soak
def test_the_table_of_splits_is_the_engines() -> None:
    code = "from tests.worker.engines import splits; print('\\n'.join(splits.lines()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = [line for line in splits.FILE.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in done.stdout.splitlines() if line in set(written)] == written


def test_a_latent_cache_is_whole_on_every_rank() -> None:
    assert kv_rank_bytes(shape("latent"), 27_000, 8, 1) == 27_000
    assert kv_rank_bytes(shape("grouped"), 32_000, 8, 1) == 4_000
    # More ranks than heads of keys: each keeps one.
    assert kv_rank_bytes(shape("grouped"), 32_000, 16, 1) == 4_000
    assert kv_rank_bytes(shape("grouped"), 32_000, 2, 4) == 4_000


def test_a_model_fits_where_its_weights_and_a_cache_do() -> None:
    llama = Layout((436_224_000,) * 32, 1_050_673_152, 1_050_673_152, 8192, (("BF16", 16_060_522_496),))
    found = {fit.device: fit for fit in fits_of(
        shape("grouped"), llama, kv_bytes_per_token=131_072, max_context_tokens=131_072
    )}  # fmt: skip
    # Sixteen gigabytes of weights: one card of 24 GiB, two of 16, no slice below 18 GB.
    splits = {name: (found[name].tensor_parallel, found[name].pipeline_parallel) for name in ("16 GiB", "24 GiB")}
    assert splits == {"16 GiB": (2, 1), "24 GiB": (1, 1)}
    assert found["80 GiB"].kv_tokens > found["24 GiB"].kv_tokens > 2048
    assert {name for name in found if name.startswith("MIG")} == {
        "MIG 2g.20gb", "MIG 2g.35gb", "MIG 3g.40gb", "MIG 3g.71gb"
    }  # fmt: skip


@given(st.integers(1, 80), st.integers(1, 1 << 30), st.integers(0, 2 << 30), st.booleans(), st.integers(0, 1 << 20))
def test_what_fits_stays_within_its_devices(
    layers: int, block: int, embedding: int, is_tied: bool, token_bytes: int
) -> None:
    layout = Layout((block,) * layers, embedding, 0 if is_tied else embedding, 7, ())
    model = Shape(32, 8, layers, 32000, 11008)
    for fit in fits_of(model, layout, kv_bytes_per_token=token_bytes, max_context_tokens=4096):
        assert fit.needed_bytes + fit.kv_bytes <= 0.9 * fit.device_bytes == 0.9 * DEVICES[fit.device]
        assert fit.tensor_parallel in tensor_parallel_options(model)
        assert fit.pipeline_parallel in pipeline_parallel_options(model)
        ranks = fit.tensor_parallel * fit.pipeline_parallel
        assert ranks == 1 or not fit.device.startswith("MIG")
        # No rank less than all ranks' share of the weights.
        assert (fit.needed_bytes - 1) * ranks >= layout.total_bytes - layout.other_bytes - ranks


@pytest.mark.soak
@pytest.mark.parametrize("name", ["tied, odd", "experts", "latent"])
async def test_a_plan_lists_the_modules_that_stay_whole(name: str) -> None:
    # Two layers are as good as sixty, and quicker.
    config: dict[str, Any] = CONFIGS[name] | {"num_hidden_layers": 2}
    planner = Planner(timeout_seconds=110)
    plan = await planner.plan(name, json.dumps(config).encode())
    assert isinstance(plan, Plan), plan
    assert plan.model_class == config["architectures"][0]
    assert [block for block, _ in plan.blocks] == ["model.layers.0", "model.layers.1"]
    assert len(plan.no_split_classes) >= 1
    others = dict(plan.others)
    assert others["model.embed_tokens"] == config["vocab_size"] * config["hidden_size"] * 2
    assert plan.tied == ((("lm_head.weight", "model.embed_tokens.weight"),) if name == "tied, odd" else ())
    assert abs(sum(size for _, size in (*plan.blocks, *plan.others)) - plan.total_bytes) <= plan.total_bytes / 1000
    assert await planner.plan(name, b"") is plan


async def test_a_process_that_makes_no_plan_is_told_of() -> None:
    found = await Planner(timeout_seconds=60, module="this").plan("x", b"{}")
    assert found == "the process that was to make it ended with status 0"


@pytest.mark.soak
async def test_a_model_that_nobody_knows_has_no_plan_and_says_why() -> None:
    found = await Planner(timeout_seconds=110).plan("x", b'{"model_type": "no-such-model"}')
    assert isinstance(found, str)
    assert "no-such-model" in found


def test_a_process_that_makes_plans_ends_with_the_registry(tmp_path: Path) -> None:
    # Its input ends at once; to import torch takes longer than to see that.
    module = "helios.registry.profiles.empty_weights"
    ended = subprocess.run(
        [sys.executable, "-P", "-m", module, str(tmp_path / "config.json")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=100,
        check=False,
        env=environment_of(tmp_path),
    )
    assert (ended.returncode, ended.stdout) == (3, b"")


async def test_a_plan_that_takes_too_long_is_given_up() -> None:
    assert await Planner(timeout_seconds=0.05).plan("x", b"{}") == "it took longer than 0.05 s"


async def test_the_contract_over_mtls(parts: Parts, mesh: Mesh, model_directory: Path) -> None:
    done = await parts.ingest("org/m", model_directory)
    digest = done.model.revision.digest
    async with serve(parts, mesh) as address:
        async with mesh.dialer(address, "admin-edge") as dialer:
            client = ProfileClient(dialer)
            found = await client.get("org/m", has_plan=True)
            assert found.revision.digest == digest
            assert len(found.layer_bytes) == tiny.LAYERS == len(found.plan.blocks), found.plan_error
            # What Accelerate makes of the config is what the headers of the weights say.
            assert [block.size_bytes for block in found.plan.blocks] == list(found.layer_bytes)
            assert list(found.plan.no_split_classes) == ["LlamaDecoderLayer"]
            assert [list(group.names) for group in found.plan.tied] == [["lm_head.weight", "model.embed_tokens.weight"]]
            assert sum(found.layer_bytes) + found.embedding_bytes + found.other_bytes == sum(
                found.weights_by_dtype.values()
            )
            assert list(found.tensor_parallel_options) == [1, 2, 4]
            assert found.fits[0].device == "MIG 1g.5gb"
            with pytest.raises(PermissionDenied):
                await client.exchange([], [digest])
        async with mesh.dialer(address, "proxy") as dialer:
            client = ProfileClient(dialer)
            told = [Measure(digest, "a" * 64, False, 500), Measure(digest, "a" * 64, False, 300)]
            unknown = Measure(f"sha256:{'0' * 64}", "a" * 64, True, 9)
            await client.exchange([*told, unknown], [])
            kept = await client.exchange([Measure(digest, "b" * 64, True, 7)], [digest, unknown.revision])
            assert [(one.settings_sha256[0], one.is_gpu, one.fixed_bytes) for one in kept] == [
                ("a", False, 500), ("b", True, 7)
            ]  # fmt: skip
            with pytest.raises(InvalidRequest):
                await client.exchange([Measure(digest, "short", False, 1)], [])
            shown = await client.get(f"org/m@{digest}")
            assert [measure.fixed_bytes for measure in shown.measures] == [500, 7]
            assert not shown.HasField("plan")


async def test_an_adapter_has_no_profile_of_its_own(parts: Parts, tmp_path: Path) -> None:
    await parts.ingest("adapter", write_adapter(tmp_path / "adapter"))
    with pytest.raises(PreconditionFailed) as caught:
        await parts.profiles.describe(Reference("adapter"), has_plan=False)
    assert caught.value.reason == "NO_PROFILE"
