"""Fixtures of the registry's tests."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from helios.registry.database import Database
from tests.registry.postgresql import Server, postgresql
from tests.registry.stores import Place, Templates, opened
from tests.registry.support import Mesh, Parts, open_parts
from tests.registry.tiny import write_gguf, write_model


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    """A registry without its server, on an empty directory."""
    async with open_parts(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    """A tiny model as a directory."""
    return write_model(tmp_path / "model")


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    """Certificates of a mesh."""
    return Mesh(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """A PostgreSQL that runs."""
    with postgresql() as server, server.running():
        yield server


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory, postgresql_server: Server) -> Templates:
    """Databases to copy."""
    return Templates.make(tmp_path_factory.mktemp("templates"), postgresql_server)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Which database a test runs on: each on both."""
    return str(request.param)


@pytest.fixture
def empty_place(database_kind: str, templates: Templates, tmp_path: Path) -> Iterator[Place]:
    """A database without tables."""
    with templates.place(database_kind, tmp_path, is_empty=True) as place:
        yield place


@pytest.fixture
def place(database_kind: str, templates: Templates, tmp_path: Path) -> Iterator[Place]:
    """A database that is up to date, and empty."""
    with templates.place(database_kind, tmp_path, is_empty=False) as place:
        yield place


@pytest.fixture
async def database(place: Place) -> AsyncIterator[Database]:
    """The same, opened."""
    async with opened(place) as database:
        yield database
