"""Fixtures of the supervisor's tests."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helios.worker.supervisor.process_tree import become_subreaper


@pytest.fixture
def folder(leaves_nothing: None) -> Iterator[Path]:
    """A directory with a short name: the path of a unix socket has at most 107 bytes."""
    become_subreaper()
    with tempfile.TemporaryDirectory(prefix="sup") as name:
        yield Path(name)


@pytest.fixture
def orphans(leaves_nothing: None) -> Iterator[list[int]]:
    """Sessions that a test started by hand: whatever is left of them is killed."""
    become_subreaper()
    sessions: list[int] = []
    yield sessions
    for session in sessions:
        try:
            os.killpg(session, signal.SIGKILL)
        except ProcessLookupError:
            continue
