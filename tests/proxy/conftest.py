"""A world a test: identities in a directory of its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helios.mesh.identity import CertificateAuthority
from tests.proxy.harness import World


@pytest.fixture
def world() -> Iterator[World]:
    """Returns a world in which nothing runs yet. Its path is short: a unix socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hp") as name:
        directory = Path(name)
        yield World(directory, CertificateAuthority.open(directory / "ca"))
