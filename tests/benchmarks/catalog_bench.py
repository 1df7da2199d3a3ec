"""How fast a large registry answers: 10,000 models and a million files, over gRPC with mTLS.

A page of 100 models, and what `model@tag` means, on SQLite and on PostgreSQL. Client and server share one process, so
the times hold both sides. The rows are made by SQL: a million files would take an hour to ingest.
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
from tests.registry.postgresql import postgresql
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
    """Measures both calls, on SQLite and then on PostgreSQL."""
    # On the disk of the repository: /tmp may be memory.
    build = Path(__file__).resolve().parents[2] / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        async with large_registry(Path(scratch)) as dialer:
            found = await measure_calls(dialer, "registry")
    with tempfile.TemporaryDirectory(dir=build) as scratch, postgresql() as server, server.running():
        async with large_registry(Path(scratch), server.make_database("large")) as dialer:
            return [*found, *(await measure_calls(dialer, "registry.postgresql"))]


async def measure_calls(dialer: Dialer, name: str) -> list[dict[str, Any]]:
    """Measures both calls."""
    dice = random.Random(1)
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

    return [*(await measure(f"{name}.list_page", page)), *(await measure(f"{name}.resolve", resolve))]


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
async def large_registry(directory: Path, database_url: str = "") -> AsyncIterator[Dialer]:
    """Serves a registry with many models; yields a dialer to it."""
    mesh = Mesh(directory / "pki")
    async with open_parts(directory / "registry", database_url=database_url) as parts:
        # Beside the registry that runs: one that starts looks for the blob of each file.
        database = await Database.open(database_url or parts.state.database)
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
    async with database.transaction() as connection:
        for table, values in rows.items():
            await connection.execute(insert(table), values)
        for statement in file_statements(HASHES[connection.dialect.name]):
            await connection.execute(text(statement))
        # As PostgreSQL's own housekeeping does some time after so many rows came.
        await connection.execute(text("ANALYZE"))


# A hash of a number, spread over the directories as real ones are.
HASHES = {
    "sqlite": "printf('%02x%062d', {0} % 256, {0})",
    "postgresql": "lpad(to_hex(({0}) % 256), 2, '0') || lpad(({0})::text, 62, '0')",
}


def file_statements(hash_of: str) -> list[str]:
    """Returns what makes the rows of files, by the number that each revision carries as its time."""
    series = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {0})"
    hash_of_file = hash_of.format(f"(revisions.created_at_us * {FILES_OF_A_MODEL} + n.i)")
    blobs = f"INSERT INTO blobs {series.format(MODELS * FILES_OF_A_MODEL)} SELECT {hash_of.format('i')}, 1 FROM n"
    entries = (
        f"INSERT INTO entries (revision, path, blob, media_type) {series.format(FILES_OF_A_MODEL)} SELECT digest, "
        f"'part-' || n.i, {hash_of_file}, 'application/vnd.cncf.model.weight.v1.raw' FROM revisions, n"
    )
    return [blobs, entries]
