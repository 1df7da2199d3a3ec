"""Memory, ports and cores of the node."""

import socket
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from helios.worker.supervisor.core_placement import place
from helios.worker.supervisor.host import cpu_device, pick_free_port, usable_memory_bytes, used_memory_bytes

GIB = 1 << 30


def machine(folder: Path, *, cgroup: str, limits: dict[str, str]) -> tuple[Path, Path]:
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal:       {16 * GIB // 1024} kB\nMemAvailable: {12 * GIB // 1024} kB\n")
    (proc / "self/cgroup").write_text(cgroup)
    for path, text in limits.items():
        file = cgroups / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return proc, cgroups


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected_gib"),
    [
        ("0::/\n", {}, 16),
        ("0::/a/b\n", {"a/memory.max": f"{4 * GIB}\n", "a/b/memory.max": "max\n"}, 4),
        ("0::/a\n", {"a/memory.max": f"{64 * GIB}\n"}, 16),
        ("4:memory:/pod\n0::/\n", {"memory/pod/memory.limit_in_bytes": f"{2 * GIB}\n"}, 2),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 16),
        ("", {}, 16),
    ],
)
def test_the_lowest_limit_above_the_process_counts(
    tmp_path: Path, cgroup: str, limits: dict[str, str], expected_gib: int
) -> None:
    proc, cgroups = machine(tmp_path, cgroup=cgroup, limits=limits)
    assert usable_memory_bytes(proc, cgroups) == expected_gib * GIB


V2 = f"anon {GIB}\nactive_file {GIB}\ninactive_file {GIB}\nunevictable {GIB}\n"
V1 = f"active_file 7\ntotal_active_file {GIB // 2}\ntotal_inactive_file {GIB // 2}\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected_gib"),
    [
        # The machine's: 16, of which 12 are available.
        ("", {}, 4),
        ("0::/a\n", {"a/memory.max": "max\n", "a/memory.current": f"{9 * GIB}\n", "a/memory.stat": V2}, 4),
        # Its own limit of 4, with 3 in use, of which 2 are files that can be dropped.
        ("0::/a\n", {"a/memory.max": f"{4 * GIB}\n", "a/memory.current": f"{3 * GIB}\n", "a/memory.stat": V2}, 1),
        # Full without anything to drop, and the machine has plenty.
        ("0::/a\n", {"a/memory.max": f"{4 * GIB}\n", "a/memory.current": f"{4 * GIB}\n"}, 4),
        # The limit above is wider, but its neighbours fill it.
        (
            "0::/a/b\n",
            {
                "a/memory.max": f"{8 * GIB}\n",
                "a/memory.current": f"{8 * GIB}\n",
                "a/b/memory.max": f"{4 * GIB}\n",
                "a/b/memory.current": f"{GIB}\n",
            },
            4,
        ),
        # A limit beyond what the machine has left.
        ("0::/a\n", {"a/memory.max": f"{14 * GIB}\n", "a/memory.current": f"{GIB}\n"}, 2),
        (
            "4:memory:/pod\n0::/\n",
            {
                "memory/pod/memory.limit_in_bytes": f"{2 * GIB}\n",
                "memory/pod/memory.usage_in_bytes": f"{2 * GIB}\n",
                "memory/pod/memory.stat": V1,
            },
            1,
        ),
        ("0::/a\n", {"a/memory.max": f"{4 * GIB}\n"}, 0),
    ],
)
def test_what_is_used_is_what_the_fullest_limit_leaves_no_room_for(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected_gib: int
) -> None:
    proc, cgroups = machine(tmp_path, cgroup=cgroup, limits=files)
    assert used_memory_bytes(proc, cgroups) == expected_gib * GIB


def test_the_device_has_what_is_set_or_a_share_of_the_machine() -> None:
    assert cpu_device(5).memory_bytes == 5
    assert cpu_device(None).memory_bytes == int(usable_memory_bytes() * 0.6)


def test_a_port_that_somebody_listens_on_is_not_picked() -> None:
    port = pick_free_port("127.0.0.1", frozenset(), seed=7)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        assert pick_free_port("127.0.0.1", frozenset(), seed=7) != port
    assert pick_free_port("127.0.0.1", frozenset({port}), seed=7) != port


@given(slot=st.integers(0, 7), cores=st.lists(st.integers(0, 63), unique=True, max_size=9), count=st.integers(0, 4))
def test_an_engine_gets_only_given_cores_and_leaves_one_to_serve(slot: int, cores: list[int], count: int) -> None:
    placement = place(slot, cores, engine_core_count=count)
    assert set(placement.engine_cores) < set(cores) or placement.engine_cores == ()
    assert len(placement.engine_cores) == (min(count, len(cores) - 1) if len(cores) >= 2 else 0)


def test_neighbours_compute_on_different_cores() -> None:
    assert [place(slot, (0, 1), engine_core_count=1).engine_cores for slot in range(3)] == [(1,), (0,), (1,)]


@given(slot=st.integers(0, 7), core_count=st.integers(2, 9), ranks=st.integers(2, 8))
def test_each_rank_has_a_core_while_there_are_enough(slot: int, core_count: int, ranks: int) -> None:
    placement = place(slot, tuple(range(core_count)), engine_core_count=1, rank_count=ranks)
    assert len(set(placement.engine_cores)) == min(ranks, core_count)
