"""Emulators as fixtures: one of a kind for a whole run, started by the first test that asks for it.

def test_…(seaweedfs_server: Emulator) -> None:
    bucket = make_bucket(seaweedfs_server)          # of this test alone
    S3Store(bucket, config=seaweedfs_server.options)
"""

from collections.abc import Iterator

import pytest

from tests.emulators.buckets import make_bucket
from tests.emulators.servers import Emulator, azurite, seaweedfs


@pytest.fixture(scope="session")
def seaweedfs_server() -> Iterator[Emulator]:
    """S3."""
    _start_runtime()
    with seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs_bucket(seaweedfs_server: Emulator) -> str:
    """A bucket of the run, for tests that take a prefix of their own: making one takes a second on a busy machine."""
    return make_bucket(seaweedfs_server)


@pytest.fixture(scope="session")
def azurite_server() -> Iterator[Emulator]:
    """Azure Blob Storage."""
    _start_runtime()
    with azurite() as server:
        yield server


@pytest.fixture(scope="session")
def azurite_bucket(azurite_server: Emulator) -> str:
    """A container of the run."""
    return make_bucket(azurite_server)


def _start_runtime() -> None:
    """Starts the threads that obstore keeps for the life of the process, so that they are no test's leak."""
    import obstore  # noqa: PLC0415 - a tenth of a second that most tests need not pay
    from obstore.store import MemoryStore  # noqa: PLC0415

    obstore.put(MemoryStore(), "warm", b"")
