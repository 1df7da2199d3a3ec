"""The key of compiled code: equal for equal inputs, another for each thing that differs."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from helios.worker.replica.compile_cache import (
    CacheDirectory,
    CompileInputs,
    cache_key,
    drop_unproven,
    drop_unused,
    inputs_document,
    mark_proven,
    processor_architecture,
    use_directory,
)

INPUTS = CompileInputs(
    revision="sha256:" + "5" * 64,
    flags={"dtype": "bfloat16", "max_num_seqs": 64},
    engine_version="0.32.0",
    engine_path="/usr/lib/python3/vllm",
    torch_version="2.13.0+cpu",
    driver="",
    architecture="x86_64-0123456789abcdef",
    thread_count=4,
)


def test_the_order_of_flags_is_nothing() -> None:
    same = replace(INPUTS, flags={"max_num_seqs": 64, "dtype": "bfloat16"})
    assert cache_key(same) == cache_key(INPUTS)
    assert len(cache_key(INPUTS)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "sha256:" + "6" * 64},
        {"flags": {"dtype": "float16", "max_num_seqs": 64}},
        {"flags": {"dtype": "bfloat16"}},
        {"engine_version": "0.32.1"},
        {"engine_path": "/opt/vllm"},
        {"thread_count": 8},
        {"torch_version": "2.13.1+cpu"},
        {"driver": "570.1"},
        {"architecture": "x86_64-fedcba9876543210"},
        # What moves from one field to the next is not the same.
        {"driver": INPUTS.architecture, "architecture": ""},
    ],
    ids=str,
)
def test_each_thing_that_differs_is_another_key(change: dict[str, object]) -> None:
    assert cache_key(replace(INPUTS, **change)) != cache_key(INPUTS)  # type: ignore[arg-type]


def test_the_key_is_the_digest_of_what_people_read() -> None:
    text = inputs_document(INPUTS)
    assert hashlib.sha256(text.encode()).hexdigest() == cache_key(INPUTS)
    assert json.loads(text)["flags"] == INPUTS.flags


def test_what_no_start_proved_goes_unless_one_is_under_way(tmp_path: Path) -> None:
    path = tmp_path / cache_key(INPUTS)
    drop_unproven(path)
    taken = use_directory(str(tmp_path), INPUTS)
    (path / "kernel").write_bytes(b"half a ker")
    drop_unproven(path)
    assert (path / "kernel").exists()
    taken.release()
    drop_unproven(path)
    assert list(tmp_path.iterdir()) == []
    taken = use_directory(str(tmp_path), INPUTS)
    (path / "kernel").write_bytes(b"kernel")
    mark_proven(path)
    taken.release()
    drop_unproven(path)
    assert (path / "kernel").read_bytes() == b"kernel"


def test_what_a_killed_start_left_half_removed_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / cache_key(INPUTS)
    for _ in range(2):
        use_directory(str(tmp_path), INPUTS).release()
        (path / "kernel").write_bytes(b"half a ker")
        with pytest.MonkeyPatch.context() as killed:
            killed.setattr(shutil, "rmtree", lambda *_, **__: None)
            drop_unproven(path)
        assert not path.exists()
    assert drop_unused(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def used(root: Path, number: int) -> CacheDirectory:
    """Takes the number-th of several directories into use, each a second later than the one before."""
    taken = use_directory(str(root), replace(INPUTS, driver=str(number)))
    (taken.path / "kernel").write_bytes(b"x" * 100)
    os.utime(taken.path, (number, number))
    return taken


def test_the_directory_is_made_once_and_shared(tmp_path: Path) -> None:
    first = use_directory(str(tmp_path), INPUTS)
    (first.path / "kernel").write_text("x")
    second = use_directory(str(tmp_path), INPUTS)
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
            taken = use_directory(str(tmp_path), INPUTS)
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


def test_a_processor_is_known_by_its_instruction_sets_in_any_order() -> None:
    first = processor_architecture("x86_64", "processor: 0\nmodel name: A\nflags\t\t: sse avx\nflags\t\t: sse avx\n")
    assert first == processor_architecture("x86_64", "processor: 0\nmodel name: B\nflags\t\t: avx sse\n")
    assert first != processor_architecture("x86_64", "flags\t\t: avx sse avx512f\n")
    assert processor_architecture("aarch64", "Features\t: fp asimd\n") != processor_architecture("aarch64", "")
