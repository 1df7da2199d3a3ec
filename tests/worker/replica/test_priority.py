"""A start in the background: behind everybody else until it is ready, and then like any other. Real processes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from helios.worker.replica.priority import can_return

AUTOGROUP = Path("/proc/self/autogroup")
TIMEOUT_SECONDS = 30
# A replica in small: a session's leader that steps back, then gets a thread, a child and a grandchild.
REPLICA = textwrap.dedent("""
    import json, os, pathlib, sys, threading, time
    from helios.worker.replica.priority import step_back, step_forward

    def policies():
        own = [int(task) for pid in (os.getpid(), *map(int, children)) for task in os.listdir(f"/proc/{pid}/task")]
        autogroup = pathlib.Path("/proc/self/autogroup")
        weight = autogroup.read_text().split()[-1] if autogroup.exists() else ""
        return [[os.sched_getscheduler(task) for task in own], weight]

    os.setsid()
    step_back()
    stop = threading.Event()
    threading.Thread(target=stop.wait, daemon=True).start()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild:
            os.write(writer, f"{os.getpid()} {grandchild}".encode())
        time.sleep(20)
        os._exit(0)
    children = os.read(reader, 100).decode().split()
    before = policies()
    step_forward()
    after = policies()
    for pid in children:
        os.kill(int(pid), 9)
    print(json.dumps([before, after]))
""")
# Two sessions share a core; says what the second got for each second that the first got.
NEIGHBOURS = textwrap.dedent("""
    import os, sys, time
    from helios.worker.replica.priority import step_back

    reader, writer = os.pipe()
    core = {max(os.sched_getaffinity(0))}
    begin = time.monotonic() + 0.2
    for name in ("serves", "starts"):
        if os.fork() == 0:
            os.setsid()
            os.sched_setaffinity(0, core)
            if name == "starts":
                step_back()
            while time.monotonic() < begin:
                pass
            spent = time.process_time()
            while time.monotonic() < begin + 1:
                pass
            os.write(writer, f"{name} {time.process_time() - spent}\\n".encode())
            os._exit(0)
    for _ in range(2):
        os.wait()
    got = dict(line.split() for line in os.read(reader, 1000).decode().splitlines())
    print(float(got["starts"]) / float(got["serves"]))
""")


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_that_a_background_start_forked_is_like_any_other_when_it_is_ready() -> None:
    (behind, weight_behind), (ready, weight_ready) = json.loads(run(REPLICA))
    assert len(behind) == 4, "a leader with a thread, a child, a grandchild"
    if can_return():
        assert set(behind) == {os.SCHED_IDLE}
    assert set(ready) == {os.SCHED_OTHER}
    if AUTOGROUP.exists():
        assert (weight_behind, weight_ready) == ("19", "0")


@pytest.mark.skipif(not AUTOGROUP.exists() and not can_return(), reason="this process may not lower itself and return")
def test_a_start_in_the_background_leaves_a_shared_core_to_who_serves() -> None:
    # Equal neighbours share evenly; a third is far from both 0.03 and 1 on a machine as busy as may be.
    assert float(run(NEIGHBOURS)) < 0.33


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a user that may become another one")
def test_who_may_not_raise_priorities_does_not_go_where_nobody_leads_back() -> None:
    script = textwrap.dedent("""
        import os
        from helios.worker.replica.priority import can_return, step_back, step_forward
        os.setgid(65534)
        os.setuid(65534)
        os.setsid()
        step_back()
        step_forward()
        print(can_return(), os.sched_getscheduler(0))
    """)
    assert run(script).split() == ["False", str(os.SCHED_OTHER)]
