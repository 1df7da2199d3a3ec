"""Children come back however often they die, and a start that fails is one more death."""

import asyncio
import sys
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
        await child.stop()
    assert child.record.state == "stopped"


async def test_stopping_a_child_that_waits_for_its_restart_starts_nothing(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    script = f"open({str(marks)!r}, 'a').write('x')"
    child = Child(ChildSpec("test", [sys.executable, "-c", script], tmp_path / "test.log"), lambda: None)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(child.run(), name="run")
        while child.record.state != "restarting":
            await asyncio.sleep(0.005)
        await child.stop()
        assert child.record.state == "stopped"
        begun = marks.read_text(encoding="ascii")
    assert marks.read_text(encoding="ascii") == begun
