"""Directories for temporary files, named after front processes."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from helios.worker.replica.scratch import make_scratch, remove_scratch, sweep_scratch


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_what_is_made_is_the_default_and_goes_with_its_content(tmp_path: Path) -> None:
    path = make_scratch(os.getpid())
    assert path.parent == tmp_path
    with tempfile.NamedTemporaryFile(delete=False) as file:
        assert Path(file.name).parent == path
    remove_scratch(os.getpid())
    remove_scratch(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_removes_those_of_the_dead_and_no_others(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait(10)
    living = make_scratch(os.getpid())
    tempfile.tempdir = str(tmp_path)
    dead = make_scratch(gone.pid)
    tempfile.tempdir = str(tmp_path)
    (tmp_path / "helios-replica-1-999999999").mkdir()  # another pid namespace
    (tmp_path / "something").mkdir()
    assert sweep_scratch() == 1
    assert living.exists()
    assert not dead.exists()
    assert len(list(tmp_path.iterdir())) == 3
