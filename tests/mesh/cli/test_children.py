"""Children come back however often they die, and a start that fails is one more death."""

import asyncio
import sys
import time
from pathlib import Path

from helios.cli.children import Child, ChildSpec, backoff_seconds


def test_waits_grow_to_their_cap_and_never_overflow() -> None:
    waits = [backoff_seconds(count) for count in (1, 2, 3, 5_000)]
    assert waits == [0.2, 0.4, 0.8, 5.0]


async def test_a_program_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "program"
    child = Child(ChildSpec("test", [str(program)], tmp_path / "test.log"), lambda: None)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(child.run(), name="run")
        while child.record.restart_count < 1:
            await asyncio.sleep(0.01)
        assert "can't be started" in child.record.detail
        program.symlink_to(sys.executable)
        while not child.is_ready:
            assert not running.done()
            await asyncio.sleep(0.01)
        await child.stop(time.monotonic() + 10)
    assert child.record.state == "stopped"


async def test_stopping_a_child_that_waits_for_its_restart_starts_nothing(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    script = f"open({str(marks)!r}, 'a').write('x')"
    child = Child(ChildSpec("test", [sys.executable, "-c", script], tmp_path / "test.log"), lambda: None)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(child.run(), name="run")
        while child.record.state != "restarting":
            await asyncio.sleep(0.005)
        await child.stop(time.monotonic() + 10)
        assert child.record.state == "stopped"
        begun = marks.read_text(encoding="ascii")
    assert marks.read_text(encoding="ascii") == begun


async def test_a_child_that_does_not_end_is_killed_at_the_deadline_of_the_stop(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    script = f"{deaf}; print('deaf', flush=True); time.sleep(60)"
    spec = ChildSpec("test", [sys.executable, "-c", script], tmp_path / "test.log", stop_seconds=60)
    child = Child(spec, lambda: None)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(child.run(), name="run")
        while "deaf" not in (spec.log_path.read_text() if spec.log_path.exists() else ""):
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await child.stop(began + 0.3)
        assert 0.3 <= time.monotonic() - began < 5
    assert child.record.state == "stopped"
