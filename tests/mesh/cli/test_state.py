"""The state directory trusts nothing that another user may have put there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helios.cli.state import StateDirectory, is_same_process, process_started_at, read_mesh
from helios.mesh.errors import PreconditionFailed


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[StateDirectory]:
    """A state directory whose path is too long for sockets below it."""
    state = StateDirectory(tmp_path / ("d" * 100))
    yield state
    if state.sockets.is_symlink() or state.sockets.is_file():
        state.sockets.unlink()
    elif state.sockets.exists():
        state.sockets.rmdir()


def test_a_long_path_has_its_sockets_in_a_private_directory(deep: StateDirectory) -> None:
    assert deep.sockets != deep.run
    deep.sockets.mkdir(mode=0o777)
    deep.create()
    assert deep.sockets.stat().st_mode & 0o777 == 0o700


def test_sockets_never_go_through_a_link(deep: StateDirectory, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    deep.sockets.symlink_to(target)
    with pytest.raises(PreconditionFailed, match="not a directory of yours"):
        deep.create()
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_sockets_never_go_to_a_directory_of_somebody_else(deep: StateDirectory) -> None:
    deep.sockets.mkdir()
    os.chown(deep.sockets, 12345, -1)
    with pytest.raises(PreconditionFailed, match="not a directory of yours"):
        deep.create()


def test_the_admin_token_is_made_once_and_private(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    token = state.admin_token()
    assert len(token) >= 32
    assert state.admin_token() == token
    assert state.admin_token_file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["admin-token"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_an_admin_token_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    state = StateDirectory(tmp_path)
    state.admin_token()
    state.admin_token_file.chmod(mode)
    with pytest.raises(PreconditionFailed, match="can be read by others"):
        state.admin_token()


def test_an_empty_admin_token_is_refused(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.admin_token_file.touch(mode=0o600)
    with pytest.raises(PreconditionFailed, match="is empty"):
        state.admin_token()


def test_a_process_is_known_by_pid_and_start() -> None:
    started_at = process_started_at(os.getpid())
    assert started_at is not None
    assert is_same_process(os.getpid(), started_at)
    assert not is_same_process(os.getpid(), started_at + 0.01)
    assert not is_same_process(0, 0.0)


def test_a_directory_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreconditionFailed, match="--state-dir"):
        read_mesh(StateDirectory(tmp_path / "file"))


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    (home / ".bashrc").touch()
    with pytest.raises(PreconditionFailed, match="bashrc"):
        StateDirectory(home).create()
    assert home.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in home.iterdir()] == [".bashrc"]


def test_a_state_directory_may_be_empty_or_half_made_or_hold_a_users_notes(tmp_path: Path) -> None:
    (tmp_path / "s" / "pki").mkdir(parents=True)
    state = StateDirectory(tmp_path / "s")
    state.create()
    with state.lock():
        (state.root / "notes").touch()
    state.create()
