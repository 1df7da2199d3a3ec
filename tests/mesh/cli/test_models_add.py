"""What ``models add`` and ``models pull`` make of what was typed, and what they print."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from helios.cli.models_add import Addition, Bar, Lines, models_add, resolve
from helios.cli.models_follow import Manner
from helios.cli.state import StateDirectory
from helios.cli.transfer_progress import size
from helios.mesh.errors import InvalidRequest
from helios.registry.client import IngestDone, IngestPhase, IngestProgress, Model, ModelPolicy, ModelProfile, Revision

PROFILE = ModelProfile("LlamaForCausalLM", 10, 20, "bfloat16", 4, 128, 2, 100, license="mit")
REVISION = Revision("sha256:" + "0" * 64, PROFILE, "hf:org/m@" + "1" * 40, 20, datetime.now(UTC))


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        ("hf:org/m", "", "hf:org/m"),
        ("hf:org/m", "v1", "hf:org/m@v1"),
        ("ms:org/m@v2", "", "ms:org/m@v2"),
        ("oci://h/m", "v1", "oci://h/m:v1"),
        ("oci://h/m", "sha256:" + "0" * 64, "oci://h/m@sha256:" + "0" * 64),
        ("s3://b/p/", "", "s3://b/p/"),
        ("embedded:x", "", "embedded:x"),
    ],
)
def test_a_source_goes_to_the_registry_as_it_is_typed(source: str, revision: str, expected: str) -> None:
    assert resolve(Addition("m", source, revision)) == expected


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("hf:org/m@v1", "v2", "--revision is for"),
        ("https://h/x", "v2", "--revision is for"),
        ("/tmp", "v2", "--revision is for"),
        ("hf:m/../x", "", "hf:ORGANISATION/NAME"),
        ("org/m-that-is-no-path", "", "begin with hf:"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_asked(source: str, revision: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        resolve(Addition("m", source, revision))


@pytest.mark.parametrize(
    ("source", "manner", "words"),
    [
        ("hf:org/m", Manner(policy="bogus"), "no such policy"),
        ("hf:org/m", Manner(policy="rollout"), "--weight"),
        ("hf:org/m", Manner("soon"), "is no time"),
        ("hf:org/m", Manner("1s"), "an interval is"),
        ("embedded:x", Manner(), "can't be followed"),
        ("/", Manner(), "can't be followed"),
    ],
)
async def test_how_a_source_is_followed_is_judged_before_it_is_pulled(
    tmp_path: Path, source: str, manner: Manner, words: str
) -> None:
    # No mesh runs here: whoever asked one first would say so.
    with pytest.raises(InvalidRequest, match=words):
        await models_add(StateDirectory(tmp_path), Console(file=io.StringIO()), Addition("m", source, follow=manner))


def test_a_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(Addition("m", "m")) == str(tmp_path / "m")


def test_programs_get_a_document_a_line() -> None:
    output = io.StringIO()
    with Lines(Console(file=output)) as shown:
        shown.progress(IngestProgress(IngestPhase.FETCH, 5, 20, 2.5, 6.04))
        shown.progress(IngestProgress(IngestPhase.COMMIT))
        shown.done("m", IngestDone(Model("m", (), REVISION, ModelPolicy(), datetime.now(UTC)), 20))
    documents = [json.loads(line) for line in output.getvalue().splitlines()]
    assert documents[0] == {
        "phase": "fetch", "done_bytes": 5, "total_bytes": 20, "bytes_per_second": 2, "remaining_seconds": 6.0
    }  # fmt: skip
    assert documents[1]["remaining_seconds"] is None
    assert documents[2]["done"]["revision"] == REVISION.digest
    assert (documents[2]["done"]["license"], documents[2]["done"]["new_bytes"]) == ("mit", 20)


def test_people_get_rate_and_time_left_and_the_licence() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=200)
    with Bar(console) as shown:
        shown.progress(IngestProgress(IngestPhase.FETCH, 5 << 20, 20 << 20, 2.5 * (1 << 20), 3723.0))
        shown.refresh()
        shown.done("m", IngestDone(Model("m", (), REVISION, ModelPolicy(), datetime.now(UTC)), 20))
    text = output.getvalue()
    for part in ("fetch", "2.5 MiB/s", "1:02:03", "20 B new", "licence mit"):
        assert part in text


def test_sizes_are_for_people() -> None:
    assert [size(count) for count in (0, 1023, 1024, 1536 * 1024, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5120.0 GiB"
    ]  # fmt: skip
