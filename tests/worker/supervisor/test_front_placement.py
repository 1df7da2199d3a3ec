"""Fronts stay off engines' cores where there is another core, and are bound to no core where a neighbour computes."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.worker.supervisor.core_placement import place
from helios.worker.supervisor.front_placement import Cores, FrontPlacement, bind_process, front_cores
from helios.worker.supervisor.process_tree import read_process
from helios.worker.supervisor.records import Order, ProcessIdentity, ReplicaState, ReplicaView

CORES = tuple(sorted(os.sched_getaffinity(0)))
ONE, TWO = ProcessIdentity(101, 1), ProcessIdentity(102, 1)


@given(slots=st.sets(st.integers(0, 7), min_size=1), core_count=st.integers(1, 9), engine_core_count=st.integers(0, 3))
def test_a_front_is_off_all_engines_cores_or_free(slots: set[int], core_count: int, engine_core_count: int) -> None:
    cores = tuple(range(core_count))
    engines = [place(slot, cores, engine_core_count=engine_core_count).engine_cores for slot in slots]
    allowed = front_cores(engines, cores)
    assert allowed
    assert set(allowed) == set(cores) or not set(allowed) & {core for one in engines for core in one}


def ready(replica_id: str, process: ProcessIdentity, state: ReplicaState = ReplicaState.READY) -> ReplicaView:
    order = Order(replica_id, "m", "sha256:0", "vllm", 1, 1, 0, datetime(2026, 1, 1, tzinfo=UTC))
    return ReplicaView(order, state, process=process)


def test_a_neighbour_frees_a_front_before_it_starts_and_its_end_binds_it_again() -> None:
    bound: list[tuple[ProcessIdentity, Cores]] = []
    fronts = FrontPlacement((0, 1), lambda process, cores: bound.append((process, cores)))
    starting = ready("a", ONE, ReplicaState.LOADING)
    fronts.update([starting], {"a": (1,)})
    assert bound == [], "a start may use every core"
    first = ready("a", ONE)
    fronts.update([first], {"a": (1,)})
    fronts.update([first], {"a": (1,)})
    assert bound == [(ONE, (0,))]
    drained = ready("a", ONE, ReplicaState.DRAINING)
    fronts.update([drained], {"a": (1,)})
    assert bound[1:] == []
    fronts.update([drained, ready("b", TWO, ReplicaState.FETCHING)], {"a": (1,), "b": (0,)})
    assert bound[1:] == [(ONE, (0, 1))]
    fronts.update([first, ready("b", TWO)], {"a": (1,), "b": (0,)})
    assert bound[2:] == [(TWO, (0, 1))]
    fronts.update([first], {"a": (1,)})
    assert bound[3:] == [(ONE, (0,))]


THREADS = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); time.sleep(60)"


@contextlib.contextmanager
def two_threads() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", THREADS]) as child:
        try:
            process, deadline = psutil.Process(child.pid), time.monotonic() + 30
            while process.num_threads() < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            child.kill()


@pytest.mark.skipif(len(CORES) < 2, reason="there is nothing to choose")
def test_every_thread_is_bound_and_another_process_of_that_number_is_not() -> None:
    with two_threads() as process:
        entry = read_process(process.pid)
        assert entry is not None
        bind_process(entry.identity, CORES[:1])
        bind_process(ProcessIdentity(process.pid, entry.identity.start_ticks + 1), CORES[1:])
        assert [os.sched_getaffinity(thread.id) for thread in process.threads()] == [{CORES[0]}] * 2
    bind_process(entry.identity, CORES)
