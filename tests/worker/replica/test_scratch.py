"""Directories for temporary files, named after front processes."""

import os
import subprocess
import tempfile
import uuid
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from helios.worker.replica.scratch import make_scratch, remove_scratch, shared_memory_prefix, sweep_scratch


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_memory, "_SHM_NAME_PREFIX", "/psm_")


def test_what_is_made_is_the_default_and_goes_with_its_content(tmp_path: Path) -> None:
    path = make_scratch(os.getpid())
    assert path.parent == tmp_path
    with tempfile.NamedTemporaryFile(delete=False) as file:
        assert Path(file.name).parent == path
    remove_scratch(os.getpid())
    remove_scratch(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_that_a_killed_process_left_goes_too() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait(10)
    named = make_scratch(gone.pid) / f"rendezvous_{uuid.uuid4().hex}"
    named.touch()
    # What SharedMemory does without a name, but for the process that it starts to keep track.
    python = Path("/dev/shm", vars(shared_memory)["_make_filename"]().removeprefix("/"))
    python.touch()
    others = [Path("/dev/shm", f"{named.name}-rank0"), Path("/dev/shm", f"strangers_{uuid.uuid4().hex}")]
    for other in others:
        other.touch()
    try:
        assert python.name.startswith(shared_memory_prefix(gone.pid))
        remove_scratch(gone.pid)
        assert [path.exists() for path in (python, *others)] == [False, False, True]
    finally:
        others[1].unlink()


def test_no_two_processes_share_a_prefix_and_each_leaves_room_for_names() -> None:
    prefixes = [shared_memory_prefix(pid) for pid in (0, 1, 35, 36, 1295, 1296, 4194304)]
    assert len(set(prefixes)) == len(prefixes)
    assert not any(a != b and b.startswith(a) for a in prefixes for b in prefixes)
    assert max(map(len, prefixes)) <= 8


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
