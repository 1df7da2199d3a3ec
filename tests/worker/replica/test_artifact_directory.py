"""Directories of artifacts: shared while they are in use, gone when they are no good or used longest ago."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from helios.worker.replica.artifact_directory import (
    ArtifactDirectory,
    drop,
    drop_unproven,
    drop_unused,
    hold_alone,
    is_in_use,
    mark_proven,
    share,
    use,
    use_existing,
)

KEY = "5" * 64


def test_what_no_start_proved_goes_unless_one_is_under_way(tmp_path: Path) -> None:
    path = tmp_path / KEY
    drop_unproven(path)
    taken = use(tmp_path / KEY)
    (path / "kernel").write_bytes(b"half a ker")
    drop_unproven(path)
    assert (path / "kernel").exists()
    taken.release()
    drop_unproven(path)
    assert list(tmp_path.iterdir()) == []
    taken = use(tmp_path / KEY)
    (path / "kernel").write_bytes(b"kernel")
    mark_proven(path)
    taken.release()
    drop_unproven(path)
    assert (path / "kernel").read_bytes() == b"kernel"


def test_what_a_killed_start_left_half_removed_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / KEY
    for _ in range(2):
        use(tmp_path / KEY).release()
        (path / "kernel").write_bytes(b"half a ker")
        with pytest.MonkeyPatch.context() as killed:
            killed.setattr(shutil, "rmtree", lambda *_, **__: None)
            drop_unproven(path)
        assert not path.exists()
    assert drop_unused(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def used(root: Path, number: int) -> ArtifactDirectory:
    """Takes the number-th of several directories into use, each a second later than the one before."""
    taken = use(root / f"{number:064x}")
    (taken.path / "kernel").write_bytes(b"x" * 100)
    os.utime(taken.path, (number, number))
    return taken


def test_the_directory_is_made_once_and_shared(tmp_path: Path) -> None:
    first = use(tmp_path / KEY)
    (first.path / "kernel").write_text("x")
    second = use(tmp_path / KEY)
    assert second.path == first.path
    assert (first.path / "kernel").exists()
    first.release()
    second.release()


@pytest.mark.parametrize("bounds", [{"kept": 2}, {"kept_bytes": 250}], ids=str)
def test_what_was_used_longest_ago_goes_and_nothing_that_is_in_use(tmp_path: Path, bounds: dict[str, int]) -> None:
    taken = [used(tmp_path, number) for number in range(4)]
    assert drop_unused(tmp_path, **bounds) == 0
    for one in taken[1:]:
        one.release()
    # The two that were used last fill the bound; the oldest is in use.
    assert drop_unused(tmp_path, **bounds) == 1
    assert [one.path.exists() for one in taken] == [True, False, True, True]
    taken[0].release()
    assert drop_unused(tmp_path, **bounds) == 1
    assert [one.path.exists() for one in taken] == [False, False, True, True]
    assert sorted(tmp_path.iterdir()) == sorted(one.path for one in taken[2:])


def test_one_that_a_killed_process_used_is_free_again(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        used(tmp_path, 1)
        signal.pause()
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob("*/kernel")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert drop_unused(tmp_path, kept=0) == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert drop_unused(tmp_path, kept=0) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_taken_while_it_goes_is_made_anew(tmp_path: Path) -> None:
    stop = threading.Event()

    def keep_dropping() -> None:
        while not stop.is_set():
            drop_unused(tmp_path, kept=0)

    dropper = threading.Thread(target=keep_dropping)
    dropper.start()
    try:
        for _ in range(300):
            taken = use(tmp_path / KEY)
            kernel = taken.path / "kernel"
            kernel.write_text("x")
            assert kernel.exists()
            taken.release()
    finally:
        stop.set()
        dropper.join(10)


def test_what_a_crash_left_half_removed_is_not_used_and_goes(tmp_path: Path) -> None:
    (tmp_path / "gone-1" / "inner").mkdir(parents=True)
    assert drop_unused(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
    assert drop_unused(tmp_path / "nowhere") == 0


def test_who_has_one_alone_lets_nobody_in_until_it_shares(tmp_path: Path) -> None:
    assert hold_alone(tmp_path / KEY) is None
    assert not is_in_use(tmp_path / KEY)
    use(tmp_path / KEY).release()
    assert not is_in_use(tmp_path / KEY)
    lock = hold_alone(tmp_path / KEY)
    assert lock is not None
    assert hold_alone(tmp_path / KEY) is None
    assert is_in_use(tmp_path / KEY)
    share(lock)
    taken = use_existing(tmp_path / KEY)
    assert taken is not None
    os.close(lock)
    assert is_in_use(tmp_path / KEY)
    # Removed under those who use it: what they have open stays theirs, and the name is free.
    drop(tmp_path / KEY)
    drop(tmp_path / KEY)
    assert list(tmp_path.iterdir()) == []
    taken.release()
