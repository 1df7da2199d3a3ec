"""Logs stay bounded under a writer that holds them open, and are followed by whole lines."""

from pathlib import Path

from helios.cli.log_files import read_lines, rotate


def test_a_log_is_cut_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"old line\n" * 10)
        assert not rotate(path, limit_bytes=90)
        writer.write(b"one more\n")
        assert rotate(path, limit_bytes=90)
        writer.write(b"new line\n")
    assert path.read_bytes() == b"new line\n"
    assert (tmp_path / "worker.log.1").read_bytes().count(b"\n") == 11


def test_a_missing_log_is_left_alone(tmp_path: Path) -> None:
    assert not rotate(tmp_path / "none.log", limit_bytes=0)


def test_only_whole_lines_are_given(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_bytes("one\ntwo é".encode()[:-1])
    lines, position = read_lines(path, 0)
    assert lines == ["one"]
    path.write_text("one\ntwo é\n", encoding="utf-8")
    assert read_lines(path, position) == (["two é"], len("one\ntwo é\n".encode()))


def test_a_log_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_text("a long line before the cut\n", encoding="utf-8")
    _, position = read_lines(path, 0)
    path.write_text("after\n", encoding="utf-8")
    assert read_lines(path, position)[0] == ["after"]
