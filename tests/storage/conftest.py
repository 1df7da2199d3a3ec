"""A mesh for tests of the storage agent: a CA, a registry, and room."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from helios.mesh.identity import CertificateAuthority
from tests.storage.harness import Mesh, make_shelf, serve_registry
from tests.storage.local import scratch


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    """Identities and a registry with an empty shelf."""
    authority = CertificateAuthority.open(tmp_path / "ca")
    shelf = make_shelf(tmp_path / "registry" / "blobs")
    shelf.base.mkdir(parents=True)
    async with serve_registry(shelf, authority.issue("registry", tmp_path / "pki" / "registry")) as address:
        yield Mesh(tmp_path, authority, shelf, address)


@pytest.fixture
def scratch_path() -> Iterator[Path]:
    """A directory in memory, for tests that make hundreds of small disks and mean none of them to last."""
    with scratch() as path:
        yield path
