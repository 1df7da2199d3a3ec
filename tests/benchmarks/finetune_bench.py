"""What a LoRA fine-tune that was merged into its base costs a node that has the base: bytes over the wire.

The base is the embedded model. Adapters of rank 16 are merged as PEFT merges them, W + (alpha / r) B A in float32 and
back to bfloat16, and the whole is written as one safetensors file. Indexer and agent are the real ones: the registry's
cuts and hashes both files, the agent fetches the base from an object store, then the fine-tune, and compares the
whole's sha256; what the store was asked for of the second, over the file's size, is the result.

The bar is for adapters of q_proj and v_proj, what LoRA's paper uses and PEFT's default for models of this family. Those
of all linear layers change nearly everything but the embedding, and no scheme of equal bytes can help; that is reported
beside it.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from tests.conftest import embedded_model
from tests.mesh.transfer.blob_server import serve_blob
from tests.storage.harness import Mesh
from tests.storage.test_chunk_source import indexed_mesh

RANK = 16
ALPHA = 32
TARGETS = {
    "storage.finetune_wire_fraction": ("q_proj", "v_proj"),
    "storage.finetune_all_linear_wire_fraction": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
}
_WEIGHTS = "model.safetensors"


async def run() -> list[dict[str, Any]]:
    """Measures; `baseline` is the share of the file that the tensors have which the merge changed."""
    source = embedded_model() / _WEIGHTS
    results: list[dict[str, Any]] = []
    for name, targets in TARGETS.items():
        tuned, changed_bytes = merge(source, targets)
        fraction = await _wire_fraction(source.read_bytes(), tuned)
        results.append(
            {
                "name": name,
                "value": round(fraction, 4),
                "unit": "ratio",
                "baseline": round(changed_bytes / len(tuned), 4),
                "samples": 1,
            }
        )
    return results


def merge(base: Path, targets: tuple[str, ...]) -> tuple[bytes, int]:
    """Merges an adapter with random weights into a model; returns the file, and the bytes of the tensors it changed."""
    generator = torch.Generator().manual_seed(7)
    changed_bytes = 0
    with safe_open(base, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        metadata = file.metadata()
    for name, weight in tensors.items():
        if name.removesuffix(".weight").rpartition(".")[2] in targets:
            rows, columns = weight.shape
            # As after some training: A as it is initialised, B no longer zero.
            a = torch.randn(RANK, columns, generator=generator) / RANK
            b = torch.randn(rows, RANK, generator=generator) * 0.02
            merged = (weight.float() + ALPHA / RANK * (b @ a)).to(weight.dtype)
            assert not torch.equal(merged, weight), "the merge changes what it is for"
            tensors[name] = merged
            changed_bytes += merged.numel() * merged.element_size()
    return save(tensors, metadata={**(metadata or {}), "lora": json.dumps(targets)}), changed_bytes


async def _wire_fraction(base: bytes, tuned: bytes) -> float:
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as name:
        async with indexed_mesh(Path(name), base, tuned) as mesh, mesh.agent(name="node") as agent:
            assert await _fetch(mesh, agent, base) == len(base), "the node had nothing"
            return await _fetch(mesh, agent, tuned) / len(tuned)


async def _fetch(mesh: Mesh, agent: Any, content: bytes) -> int:
    """Brings a model of one file to the node; returns the bytes that the object store was asked for."""
    with serve_blob(content) as server:
        mesh.shelf.url = server.url.removesuffix("/blob")
        revision = mesh.shelf.add({_WEIGHTS: content})
        async with agent.client.materialize(revision, holder="bench") as lent:
            assert Path(lent.path, _WEIGHTS).read_bytes() == content
        return sum(last + 1 - first for first, last in server.ranges)


if __name__ == "__main__":
    for entry in asyncio.run(run()):
        print(entry)
