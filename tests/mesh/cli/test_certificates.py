"""Leaves are issued once, and anew where their CA is not the one in force."""

from pathlib import Path

from helios.cli.certificates import COMPONENTS, identity_of, issue_due
from helios.cli.state import StateDirectory


def test_leaves_are_issued_once(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    assert issue_due(state) == list(COMPONENTS)
    assert issue_due(state) == []


def test_leaves_of_another_ca_are_issued_anew(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    issue_due(state)
    (state.pki / "ca.crt").unlink()
    assert issue_due(state) == list(COMPONENTS)
    authorities = {identity_of(state, name).ca.read_bytes() for name in COMPONENTS}
    assert authorities == {(state.pki / "ca.crt").read_bytes()}
