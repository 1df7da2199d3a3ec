"""How fast the registry ingests a directory of safetensors, against a tuned copy that does the same work.

256 MiB are ingested, and copied by a loop that hashes, writes and fsyncs in 1 MiB steps. Both take turns on files with
fresh contents (a blob that the registry knows would not be stored again) that lie in the page cache, so the disk that
is written to and the hash are what counts.
"""

import hashlib
import json
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from helios.registry.artifact_store import ArtifactStore
from helios.registry.blobs import Blobs
from helios.registry.catalog import Catalog
from helios.registry.database import Database
from helios.registry.directory_store import DirectoryStore
from helios.registry.downloads import open_downloads
from helios.registry.ingest import Ingester
from helios.registry.records import IngestSpec
from helios.registry.sources.conversion import Converter
from helios.registry.sources.remote_sources import Sources
from helios.registry.sources.settings import SourceSettings
from helios.registry.sources.web import Web
from helios.registry.state import StateDirectory
from helios.registry.store import Store
from helios.registry.watch import WatchHub

ROUNDS = 8
SIZE_BYTES = 256 << 20
# 1 MiB: within the noise of smaller and larger ones on a disk, and it stays in the second-level cache.
STEP_BYTES = 1 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "torch_dtype": "bfloat16",
}


async def run() -> list[dict[str, Any]]:
    """Measures both, in turns."""
    # On the disk of the repository: /tmp may be memory, where fsync costs nothing.
    scratch_parent = Path(__file__).resolve().parents[2] / "build"
    ingest_seconds, copy_seconds = [], []
    with tempfile.TemporaryDirectory(dir=scratch_parent) as scratch:
        async with registry(Path(scratch, "registry")) as ingester:
            for turn in range(ROUNDS):
                # Whoever goes second finds a busier disk, so they take turns in that too.
                for is_ingest in (turn % 2 == 0, turn % 2 == 1):
                    source = write_model(Path(scratch, "model"))
                    started = time.monotonic()
                    if is_ingest:
                        async for _ in ingester.ingest(IngestSpec(name=f"model-{turn}", source=str(source))):
                            pass
                        ingest_seconds.append(time.monotonic() - started)
                    else:
                        copy(source / "model.safetensors", Path(scratch, "copy"))
                        copy_seconds.append(time.monotonic() - started)
                    shutil.rmtree(source)
    speed, baseline = (SIZE_BYTES / statistics.median(seconds) / 1e6 for seconds in (ingest_seconds, copy_seconds))
    ratio = {"name": "registry.ingest_ratio", "value": speed / baseline, "unit": "ratio", "baseline": 1.0}
    absolute = {"name": "registry.ingest_speed", "value": speed, "unit": "MB/s", "baseline": baseline}
    return [{**ratio, "samples": ROUNDS}, {**absolute, "samples": ROUNDS}]


@asynccontextmanager
async def registry(directory: Path) -> AsyncIterator[Ingester]:
    """Puts the registry together as its process does, without the server."""
    async with AsyncExitStack() as stack:
        state = stack.enter_context(StateDirectory(directory).owned())
        database = await Database.open(state.database)
        stack.push_async_callback(database.close)
        blob_store = DirectoryStore(state.blobs)
        blob_store.prepare()
        store = Store(database)
        blobs = Blobs(blob_store, store.blobs, disk=state.root, reserve_bytes=0)
        hub = WatchHub(16)
        stack.callback(hub.close)
        converter = Converter(timeout_seconds=60, require_space=blobs.require_space)
        catalog = Catalog(store, blobs, hub, ArtifactStore(database))
        web = await stack.enter_async_context(Web())
        settings = SourceSettings()
        sources = Sources(converter, web, settings)
        downloads = open_downloads(state.downloads, blobs, settings.downloads)
        yield await stack.enter_async_context(Ingester(catalog, state, sources, downloads))


def write_model(directory: Path) -> Path:
    """Writes a model of random weights: 16 tensors in one file."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    tensor_bytes = SIZE_BYTES // 16
    header = {
        f"model.layers.{index}.weight": {
            "dtype": "BF16",
            "shape": [tensor_bytes // 2],
            "data_offsets": [index * tensor_bytes, (index + 1) * tensor_bytes],
        }
        for index in range(16)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(16):
            file.write(os.urandom(tensor_bytes))
        # Else the kernel would write these bytes out during the measurement.
        os.fsync(file.fileno())
    return directory


def copy(source: Path, target: Path) -> None:
    """Does what storing a blob needs, and nothing else."""
    digest = hashlib.sha256()
    step = memoryview(bytearray(STEP_BYTES))
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while count := reader.readinto(step):
            digest.update(step[:count])
            writer.write(step[:count])
        os.fsync(writer.fileno())
    target.rename(target.with_name(digest.hexdigest()))
