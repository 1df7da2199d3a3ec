"""The journal: what it says is what was noted, and of other bytes it says nothing."""

from contextlib import closing
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from helios.mesh.transfer.journal import Journal, JournalHeader, discard, journal_path

HEADER = JournalHeader(size_bytes=100, sha256="ab", etag='"1"', grid="uniform:10")
CLAIMS = {index: bytes([index]) * 32 for index in range(8)}


def _claims(target: Path, header: JournalHeader = HEADER) -> dict[int, bytes]:
    journal, claims = Journal.open(target, header)
    journal.close()
    return claims


def _target(tmp_path: Path) -> Path:
    target = tmp_path / "blob"
    target.touch()
    return target


def test_claims_survive(tmp_path: Path) -> None:
    target = _target(tmp_path)
    journal, claims = Journal.open(target, HEADER)
    assert claims == {}
    with closing(journal):
        journal.append({0: CLAIMS[0]})
        journal.append({3: CLAIMS[3], 2: CLAIMS[2]})
    assert _claims(target) == {index: CLAIMS[index] for index in (0, 2, 3)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut_bytes=st.integers(0, 400))
def test_a_torn_end_costs_only_what_was_torn(tmp_path: Path, cut_bytes: int) -> None:
    target = _target(tmp_path)
    discard(target)
    target.touch()
    journal, _ = Journal.open(target, HEADER)
    with closing(journal):
        journal.append(CLAIMS)
    path = journal_path(target)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - min(cut_bytes, len(content))])
    claims = _claims(target)
    assert claims.items() <= CLAIMS.items()
    assert len(claims) >= len(CLAIMS) - (cut_bytes + 39) // 40
    # What is noted after a torn record is found again.
    journal, _ = Journal.open(target, HEADER)
    with closing(journal):
        journal.append({9: b"9" * 32})
    assert _claims(target)[9] == b"9" * 32


def test_claims_of_another_state_are_forgotten(tmp_path: Path) -> None:
    target = _target(tmp_path)
    for other in (
        JournalHeader(101, "ab", '"1"', "uniform:10"),
        JournalHeader(100, "cd", '"1"', "uniform:10"),
        JournalHeader(100, "ab", '"2"', "uniform:10"),
        JournalHeader(100, "ab", '"1"', "uniform:20"),
    ):
        journal, _ = Journal.open(target, HEADER)
        with closing(journal):
            journal.append(CLAIMS)
        assert _claims(target, other) == {}
        assert _claims(target) == {}


def test_claims_without_their_file_are_forgotten(tmp_path: Path) -> None:
    target = _target(tmp_path)
    journal, _ = Journal.open(target, HEADER)
    with closing(journal):
        journal.append(CLAIMS)
    target.unlink()
    assert _claims(target) == {}


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    target = _target(tmp_path)
    _claims(target)
    discard(target)
    discard(target)
    assert list(tmp_path.iterdir()) == []
