"""What is left of a replica's log when it is gone: few lines, in words, never much."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from helios.worker.supervisor.last_words import last_lines


def record(**fields: str) -> str:
    return json.dumps({"level": "error", "message": "engine failed to start", **fields})


def test_records_become_words_and_tracebacks_their_last_line(tmp_path: Path) -> None:
    log = tmp_path / "replica.log"
    raised = "Traceback (most recent call last):\n  File ...\nValueError: bad header"
    log.write_text("\n".join([record(exception=raised), "Killed", "", record(level="info", error="gone")]))
    assert last_lines(str(log)) == (
        "ERROR: engine failed to start ValueError: bad header",
        "Killed",
        "INFO: engine failed to start gone",
    )


def test_a_log_that_is_not_there_has_no_last_lines(tmp_path: Path) -> None:
    assert last_lines("") == ()
    assert last_lines(str(tmp_path / "none")) == ()
    assert last_lines(str(tmp_path)) == ()


@given(lines=st.lists(st.one_of(st.binary(max_size=400), st.just(b'{"message": "' + b"x" * 5000 + b'"}')), max_size=80))
def test_whatever_a_log_holds_little_comes_back(lines: list[bytes]) -> None:
    with TemporaryDirectory() as folder:
        log = Path(folder) / "replica.log"
        log.write_bytes(b"\n".join(lines))
        found = last_lines(str(log))
    assert len(found) <= 12
    assert sum(len(line.encode()) for line in found) <= 2048
    assert all(line and line.isprintable() for line in found)
