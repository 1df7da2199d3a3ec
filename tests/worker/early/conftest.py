"""What tests of early loads share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder(leaves_nothing: None) -> Iterator[Path]:
    """A directory with a short name: the path of a unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="early") as name:
        yield Path(name)
