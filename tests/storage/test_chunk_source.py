"""An agent and a real registry's chunk indexes: a fine-tune fetches what its base lacks, and nothing depends on it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from blake3 import blake3

from helios.api.registry.v1 import chunk_service_pb2 as pb
from helios.mesh.errors import InvalidRequest
from helios.mesh.identity import CertificateAuthority
from helios.registry.chunk_servicer import ChunkServicer
from helios.registry.sync.servicer import SyncServicer
from helios.storage.chunk_source import known_from_proto
from helios.storage.manifest import Digest
from tests.mesh.transfer.blob_server import serve_blob
from tests.registry.test_chunk_index import MIB, open_place, weights
from tests.storage.harness import Mesh, digest_of, make_shelf, serve_registry

BASE = weights(1)
TUNED = weights(900, b=77)


@asynccontextmanager
async def indexed_mesh(directory: Path, *contents: bytes, sync: SyncServicer | None = None) -> AsyncIterator[Mesh]:
    """A registry that knows the chunks of these blobs, and takes agents' sessions where `sync` is given."""
    async with open_place(directory) as place:
        for content in contents:
            await place.add(content)
        await place.indexer.index_some()
        authority = CertificateAuthority.open(directory / "ca")
        shelf = make_shelf(directory / "shelf")
        shelf.base.mkdir()
        identity = authority.issue("registry", directory / "pki" / "registry")
        async with serve_registry(shelf, identity, ChunkServicer(place.store), sync) as address:
            yield Mesh(directory, authority, shelf, address)
            if sync is not None:
                sync.close()


async def _materialise(mesh: Mesh, root: str, *contents: bytes) -> list[int]:
    """Fetches one-file models one after the other from an object store; returns how many bytes each asked for."""
    asked: list[int] = []
    async with mesh.agent(name=root) as agent:
        for content in contents:
            with serve_blob(content) as server:
                revision = mesh.shelf.add({"model.safetensors": content})
                mesh.shelf.url = server.url.removesuffix("/blob")
                async with agent.client.materialize(revision, holder="test") as lent:
                    assert Path(lent.path, "model.safetensors").read_bytes() == content
                asked.append(sum(last + 1 - first for first, last in server.ranges))
    return asked


async def test_a_fine_tune_fetches_what_its_base_does_not_have(tmp_path: Path) -> None:
    async with indexed_mesh(tmp_path, BASE, TUNED) as mesh:
        asked = await _materialise(mesh, "storage", BASE, TUNED)
    assert asked[0] == len(BASE)
    assert 3 * MIB // 2 <= asked[1] < 3 * MIB // 2 + 4096, "one of four tensors, and the header"


async def test_without_indexes_blobs_come_whole(tmp_path: Path) -> None:
    async with indexed_mesh(tmp_path) as mesh:
        assert await _materialise(mesh, "storage", BASE, TUNED) == [len(BASE), len(TUNED)]


async def test_a_registry_without_the_service_is_no_obstacle(mesh: Mesh) -> None:
    assert await _materialise(mesh, "storage", BASE) == [len(BASE)]


async def test_a_local_blob_that_was_damaged_is_not_copied_on(tmp_path: Path) -> None:
    async with indexed_mesh(tmp_path, BASE, TUNED) as mesh:
        await _materialise(mesh, "storage", BASE)
        digest = mesh.shelf.blob_path(digest_of(BASE))
        path = tmp_path / "storage" / "blobs" / "sha256" / digest.parent.name / digest.name
        path.chmod(0o644)
        with path.open("r+b") as file:
            # In the last tensor.
            file.seek(len(BASE) - 100)
            file.write(b"\0\1\2\3" * 4)
        path.chmod(0o444)
        asked = await _materialise(mesh, "storage", TUNED)
    assert 3 * MIB <= asked[0] < 3 * MIB + 4096, "the tensor that is another one, and the one that is damaged"


def test_an_index_that_makes_no_sense_is_refused() -> None:
    digest = Digest("0" * 64, 10)
    hashes = blake3(b"").digest() * 2
    for response in (
        pb.GetChunkIndexResponse(lengths=[10], blake3=hashes),
        pb.GetChunkIndexResponse(lengths=[5, 6], blake3=hashes),
        pb.GetChunkIndexResponse(lengths=[5, 5], blake3=hashes[:-1]),
    ):
        with pytest.raises(InvalidRequest):
            known_from_proto(digest, response, {})
    copies = [pb.ChunkCopy(index=9, hash="1" * 64), pb.ChunkCopy(index=0, hash="2" * 64)]
    response = pb.GetChunkIndexResponse(lengths=[5, 5], blake3=hashes, copies=copies)
    assert known_from_proto(digest, response, {"1" * 64: Path("x")}).copies == {}
