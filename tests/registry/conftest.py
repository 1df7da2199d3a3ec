"""Fixtures of the registry's tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

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
