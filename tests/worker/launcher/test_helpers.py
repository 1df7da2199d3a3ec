"""Helpers: children of the launcher that work for the next start; no replicas, one at a time, gone with it."""

import multiprocessing
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from helios.worker.launcher.messages import Decoder, Exited, Fork, Forked, Message, encode
from helios.worker.launcher.zygote import Work, Zygote
from helios.worker.replica.spec import ReplicaSpec

SECONDS = 20.0
IDLE_SECONDS = 0.1


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a launcher prepare soon after a fork."""
    monkeypatch.setattr("helios.worker.launcher.zygote._IDLE_SECONDS", IDLE_SECONDS)


class Controlled:
    """The supervisor's end of a zygote that runs in a process of its own."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self.pid = pid
        self._control = control
        self._decoder = Decoder()
        self.heard: list[Message] = []

    def fork(self, number: int) -> int:
        spec = ReplicaSpec(
            replica_id=f"r{number}", model="m", revision="sha256:1", model_path="/", created_at=datetime.now(UTC)
        )
        self._control.sendall(encode(Fork(number, spec.to_document(), time.monotonic_ns())))
        self.listen(lambda: any(isinstance(message, Forked) and message.number == number for message in self.heard))
        return next(message.pid for message in self.heard if isinstance(message, Forked) and message.number == number)

    def listen(self, is_met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not is_met():
            assert time.monotonic() < deadline, self.heard
            if select.select([self._control], [], [], 0.02)[0]:
                self.heard += self._decoder.feed(self._control.recv(1 << 16))


@contextmanager
def zygote(prepare: Callable[[ReplicaSpec], Work | None]) -> Iterator[Controlled]:
    ours, theirs = socket.socketpair()

    def run() -> None:
        ours.close()
        Zygote(theirs, lambda _spec, _at: None, prepare).run(0.0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        yield Controlled(ours, process.pid)
    finally:
        ours.close()
        process.join(SECONDS)
        assert process.exitcode is not None


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait(is_met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_gone(pid: int) -> None:
    wait(lambda: not is_alive(pid))


def lasting(directory: Path) -> Callable[[ReplicaSpec], Work]:
    """Returns a ``prepare`` whose work writes its pid and goes on until it is told to end."""

    def work(name: str) -> None:
        directory.joinpath("new").write_text(str(os.getpid()))
        directory.joinpath("new").rename(directory / name)
        wait((directory / "end").exists)

    return lambda spec: lambda: work(spec.replica_id)


def test_a_helper_is_told_to_nobody_and_one_works_at_a_time(tmp_path: Path) -> None:
    with zygote(lasting(tmp_path)) as control:
        control.fork(1)
        wait((tmp_path / "r1").exists)
        helper = int((tmp_path / "r1").read_text())
        assert os.getsid(helper) == helper, "signals to the launcher's session are not for it"
        second = control.fork(2)
        control.listen(lambda: any(isinstance(message, Exited) and message.pid == second for message in control.heard))
        time.sleep(5 * IDLE_SECONDS)
        assert not (tmp_path / "r2").exists()
        (tmp_path / "end").touch()
        wait(lambda: not Path(f"/proc/{helper}").exists())
        third = control.fork(3)
        wait((tmp_path / "r3").exists)
        control.listen(lambda: any(isinstance(message, Exited) and message.pid == third for message in control.heard))
        exited = {message.pid for message in control.heard if isinstance(message, Exited)}
        assert helper not in exited
        assert len(exited) == 3


def test_a_helper_ends_with_its_launcher_however_that_ends(tmp_path: Path) -> None:
    for name, is_killed in (("closed", False), ("killed", True)):
        directory = tmp_path / name
        directory.mkdir()
        with zygote(lasting(directory)) as control:
            control.fork(1)
            wait((directory / "r1").exists)
            helper = int((directory / "r1").read_text())
            if is_killed:
                os.kill(control.pid, signal.SIGKILL)
        wait_gone(helper)


def test_what_a_helper_fails_of_is_nobody_elses(tmp_path: Path) -> None:
    def prepare(_: ReplicaSpec) -> Work:
        def work() -> None:
            (tmp_path / "begun").touch()
            raise ZeroDivisionError

        return work

    with zygote(prepare) as control:
        control.fork(1)
        wait((tmp_path / "begun").exists)
        assert control.fork(2)
