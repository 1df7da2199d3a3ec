"""How fast a large registry answers: 10,000 models and a million files, over gRPC with mTLS.

A page of 100 models, and what `model@tag` means. Client and server share one process, so the times hold both sides. The
rows are made by SQL: a million files would take an hour to ingest.
"""

import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Table, insert, text

from helios.api.registry.v1 import registry_service_pb2 as pb
from helios.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from helios.mesh.channel import Dialer
from helios.registry.client import VersionClient
from helios.registry.database import Database
from helios.registry.tables import aliases, model_revisions, models, revisions, tags
from tests.registry.support import Mesh, open_parts, serve

MODELS = 10_000
FILES_OF_A_MODEL = 100
PAGE = 100
ROUNDS = 300
PROFILE = json.dumps(
    {
        "architecture": "LlamaForCausalLM",
        "parameter_count": 7_000_000_000,
        "weights_bytes": 14_000_000_000,
        "dtype": "bfloat16",
        "kv_bytes_per_token": 131_072,
        "max_context_tokens": 8192,
        "layer_count": 32,
        "vocabulary_size": 128_256,
    }
)


async def run() -> list[dict[str, Any]]:
    """Measures both calls."""
    dice = random.Random(1)
    # On the disk of the repository: /tmp may be memory.
    build = Path(__file__).resolve().parents[2] / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        async with large_registry(Path(scratch)) as dialer:
            versions = VersionClient(dialer)
            stub = dialer.stub(RegistryServiceStub)
            pages = [""]
            while len(pages) < MODELS // PAGE:
                answer = await stub.ListModels(pb.ListModelsRequest(page_size=PAGE, page_token=pages[-1]), timeout=60)
                pages.append(answer.next_page_token)

            async def page() -> None:
                request = pb.ListModelsRequest(page_size=PAGE, page_token=dice.choice(pages))
                assert len((await stub.ListModels(request, timeout=60)).models) == PAGE

            async def resolve() -> None:
                number = dice.randrange(MODELS)
                resolved = await versions.resolve(f"{dice.choice([name_of, alias_of])(number)}@prod")
                assert resolved.revision.digest == digest_of(number)

            return [*(await measure("registry.list_page", page)), *(await measure("registry.resolve", resolve))]


async def measure(name: str, call: Callable[[], Awaitable[None]]) -> list[dict[str, Any]]:
    """Returns the median and the 95th percentile of a call, in milliseconds."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began)
    common = {"unit": "ms", "baseline": None, "samples": ROUNDS}
    return [
        {"name": f"{name}_p50", "value": statistics.median(seconds) * 1e3, **common},
        {"name": f"{name}_p95", "value": statistics.quantiles(seconds, n=20)[-1] * 1e3, **common},
    ]


@asynccontextmanager
async def large_registry(directory: Path) -> AsyncIterator[Dialer]:
    """Serves a registry with many models; yields a dialer to it."""
    mesh = Mesh(directory / "pki")
    async with open_parts(directory / "registry") as parts:
        # Beside the registry that runs: one that starts looks for the blob of each file.
        database = await Database.open(parts.state.database)
        await fill(database)
        await database.close()
        async with serve(parts, mesh) as address, mesh.dialer(address, "admin-edge") as dialer:
            yield dialer


def name_of(number: int) -> str:
    """Returns a model's name."""
    return f"organisation-{number % 97}/model-{number:05d}"


def alias_of(number: int) -> str:
    """Returns a model's alias."""
    return f"alias-{number:05d}"


def digest_of(number: int) -> str:
    """Returns the digest of a model's revision."""
    return f"sha256:{hashlib.sha256(str(number).encode()).hexdigest()}"


async def fill(database: Database) -> None:
    """Makes the rows: of each model one revision of many files, an alias and a tag."""
    numbers = range(MODELS)
    rows: dict[Table, list[dict[str, Any]]] = {
        revisions: [
            {"digest": digest_of(n), "source": "dir:/m", "size_bytes": 1, "created_at_us": n, "profile": PROFILE}
            for n in numbers
        ],
        models: [
            {"name": name_of(n), "revision": digest_of(n), "min_replicas": 0, "max_replicas": 1, "created_at_us": n}
            for n in numbers
        ],
        model_revisions: [{"model": name_of(n), "revision": digest_of(n), "ordinal": 1} for n in numbers],
        aliases: [{"alias": alias_of(n), "model": name_of(n)} for n in numbers],
        tags: [{"model": name_of(n), "tag": "prod", "revision": digest_of(n), "moved_at_us": n} for n in numbers],
    }
    series = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :count)"
    async with database.transaction() as connection:
        for table, values in rows.items():
            await connection.execute(insert(table), values)
        await connection.execute(
            text(f"INSERT INTO blobs {series} SELECT printf('%02x%062x', i % 256, i), 1 FROM n"),
            {"count": MODELS * FILES_OF_A_MODEL},
        )
        await connection.execute(
            text(
                f"INSERT INTO entries (revision, path, blob, media_type) {series} SELECT digest, 'part-' || n.i, "
                "printf('%02x%062x', ((revisions.rowid - 1) * :count + n.i) % 256, "
                "(revisions.rowid - 1) * :count + n.i), "
                "'application/vnd.cncf.model.weight.v1.raw' "
                "FROM revisions, n"
            ),
            {"count": FILES_OF_A_MODEL},
        )
