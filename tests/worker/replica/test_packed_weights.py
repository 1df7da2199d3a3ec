"""Artifacts of packed weights on disk: whole or not there, what was verified or refused, kept within bounds."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.errors import Corrupted, DiskFull, Unsupported
from helios.worker.replica.artifact_directory import drop, drop_unused, mark_proven
from helios.worker.replica.packed_weights import (
    MANIFEST,
    PAGE_BYTES,
    WEIGHTS,
    PackedInputs,
    PackedManifest,
    PackedMatrix,
    PlainTensor,
    begin_trial,
    end_trials,
    find,
    find_proven,
    has_failed,
    is_unfit,
    mark_unfit,
    read_ahead,
    read_manifest,
    verify,
)
from helios.worker.replica.packed_writer import ArtifactWriter, bring_in, has_room
from helios.worker.supervisor.resident_files import ResidentFiles
from tests.conftest import ROOT

INPUTS = PackedInputs(
    revision="sha256:" + "5" * 64,
    flags={"dtype": "bfloat16", "runner": "generate"},
    engine_version="0.32.0",
    torch_version="2.13.0+cpu",
    driver="",
    architecture="x86_64-0123456789abcdef",
)
DATA = bytes(range(256)) * 20


def write(root: Path, inputs: PackedInputs = INPUTS, data: bytes = DATA) -> Path:
    with ArtifactWriter(str(root), inputs) as writer:
        first = writer.append(memoryview(data))
        second = writer.append(memoryview(data[:100]))
        tensor = PlainTensor(
            name="norm", dtype="uint8", shape=(len(data),), stride=(1,), offset=first, size_bytes=len(data)
        )
        matrix = PackedMatrix(layer="head", dtype="uint8", shape=(10, 10), layout=0, offset=second, size_bytes=100)
        return writer.publish("skeleton", (tensor,), (matrix,), ("layout",))


def is_found(root: Path) -> bool:
    taken = find(str(root), INPUTS)
    if taken is not None:
        taken.release()
    return taken is not None


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "sha256:" + "6" * 64},
        {"flags": {"dtype": "float32", "runner": "generate"}},
        {"flags": {"dtype": "bfloat16", "runner": "generate", "tensor_parallel_size": 2}},
        {"engine_version": "0.32.1"},
        {"torch_version": "2.13.1+cpu"},
        {"driver": "13.0-580"},
        {"architecture": "x86_64-0123456789abcdee"},
    ],
)
def test_the_name_is_another_for_each_thing_that_weights_depend_on(change: dict[str, Any]) -> None:
    assert replace(INPUTS, **change).key != INPUTS.key
    assert len(INPUTS.key) == 64


def test_the_order_of_flags_is_nothing() -> None:
    assert replace(INPUTS, flags=dict(reversed(list(INPUTS.flags.items())))).key == INPUTS.key


def test_what_was_written_is_found_by_its_inputs_alone(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert names(tmp_path) == {INPUTS.key}
    taken = find(str(tmp_path), INPUTS)
    assert taken is not None
    assert taken.path == path
    manifest = read_manifest(path)
    weights = (path / WEIGHTS).read_bytes()
    assert manifest.tensors[0].offset % PAGE_BYTES == manifest.matrices[0].offset % PAGE_BYTES == 0
    pieces: list[PlainTensor | PackedMatrix] = [*manifest.tensors, *manifest.matrices]
    for piece, data in zip(pieces, (DATA, DATA[:100]), strict=True):
        assert weights[piece.offset : piece.offset + piece.size_bytes] == data
    assert len(weights) == manifest.size_bytes
    assert manifest.size_bytes % PAGE_BYTES == 0
    assert (path / WEIGHTS).stat().st_mode & 0o222 == 0
    assert manifest.inputs["revision"] == INPUTS.revision
    taken.release()
    assert find(str(tmp_path), replace(INPUTS, engine_version="0.33.0")) is None


def flip_in_place(path: Path) -> None:
    (path / WEIGHTS).chmod(0o644)
    with (path / WEIGHTS).open("r+b") as file:
        file.seek(300)
        file.write(b"\xff")


def cut(path: Path) -> None:
    (path / WEIGHTS).chmod(0o644)
    os.truncate(path / WEIGHTS, 100)


def exchange(path: Path) -> None:
    """Another file with the size and time of the first: only its inode tells."""
    before = (path / WEIGHTS).stat()
    shutil.copy(path / WEIGHTS, path / "other")
    os.utime(path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    (path / "other").rename(path / WEIGHTS)


def lose_weights(path: Path) -> None:
    (path / WEIGHTS).unlink()


def lose_verification(path: Path) -> None:
    (path / "verified.json").unlink()


def garble(path: Path) -> None:
    (path / MANIFEST).write_bytes(b"\xff{")


def move_outside(path: Path) -> None:
    document = json.loads((path / MANIFEST).read_text())
    document["matrices"][0]["offset"] = document["size_bytes"] - 99
    (path / MANIFEST).write_text(json.dumps(document))


def name_no_layout(path: Path) -> None:
    document = json.loads((path / MANIFEST).read_text())
    document["matrices"][0]["layout"] = 1
    (path / MANIFEST).write_text(json.dumps(document))


@pytest.mark.parametrize(
    "harm",
    [flip_in_place, cut, exchange, lose_weights, lose_verification, garble, move_outside, name_no_layout],
    ids=lambda harm: harm.__name__,
)
def test_what_is_not_what_was_verified_is_never_taken(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    harm(write(tmp_path))
    with pytest.raises(Corrupted):
        find(str(tmp_path), INPUTS)
    # It was let go: it can be dropped, and made again.
    drop(tmp_path / INPUTS.key)
    assert names(tmp_path) == set()
    write(tmp_path)
    assert is_found(tmp_path)


def test_a_digest_is_checked_when_an_artifact_is_brought_in(tmp_path: Path) -> None:
    path = write(tmp_path)
    exchange(path)
    verify(path)
    assert is_found(tmp_path), "other inode, same bytes"
    flip_in_place(path)
    with pytest.raises(Corrupted):
        verify(path)


def test_a_model_that_can_not_be_had_says_so_to_the_next(tmp_path: Path) -> None:
    with ArtifactWriter(str(tmp_path), INPUTS) as writer:
        writer.append(memoryview(DATA))
        path = writer.refuse("quantised")
    assert (path / WEIGHTS).stat().st_size == 0
    with pytest.raises(Unsupported, match="quantised"):
        find(str(tmp_path), INPUTS)


def test_an_artifact_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    def fail() -> None:
        with ArtifactWriter(str(tmp_path), INPUTS) as writer:
            writer.append(memoryview(DATA))
            assert not is_found(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == set()


def test_one_process_writes_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def begin() -> None:
        with ArtifactWriter(str(tmp_path), INPUTS) as writer:
            writer.append(memoryview(DATA * 50))
            begun.set()
            signal.pause()

    process = context.Process(target=begin)
    process.start()
    try:
        assert begun.wait(10)
        with pytest.raises(BlockingIOError), ArtifactWriter(str(tmp_path), INPUTS):
            pass
        assert drop_unused(tmp_path, kept=0) == 0, "it is being written"
    finally:
        process.kill()
        process.join(10)
    assert find(str(tmp_path), INPUTS) is None
    write(tmp_path)
    assert names(tmp_path) == {INPUTS.key}


def test_what_is_in_use_stays_and_its_mapping_outlives_it(tmp_path: Path) -> None:
    write(tmp_path)
    taken = find(str(tmp_path), INPUTS)
    assert taken is not None
    assert drop_unused(tmp_path, kept_bytes=0) == 0
    taken.release()
    assert drop_unused(tmp_path, kept_bytes=0) == 1
    assert find(str(tmp_path), INPUTS) is None


def test_the_last_tenth_of_the_disk_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(total=10 << 20, free=(1 << 20) + len(DATA) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert has_room(str(tmp_path), len(DATA) - 1)
    assert not has_room(str(tmp_path), len(DATA))
    with pytest.raises(DiskFull), ArtifactWriter(str(tmp_path), INPUTS) as writer:
        writer.append(memoryview(DATA))
    assert names(tmp_path) == set()


def test_a_finished_artifact_is_locked_by_nobody(tmp_path: Path) -> None:
    path = write(tmp_path)
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_weights_that_are_not_in_memory_are_read_before_they_are_needed() -> None:
    size = 64 << 20
    # On the repository's disk: a temporary directory may be memory, and then nothing is dropped.
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="read-ahead-") as name:
        weights = Path(name, WEIGHTS)
        with weights.open("wb") as file:
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        looked_at = ResidentFiles([weights])
        assert looked_at.resident_bytes() < size / 2, "it was dropped"
        read_ahead(Path(name))
        deadline = time.monotonic() + 20
        while looked_at.resident_bytes() < size:
            assert time.monotonic() < deadline, looked_at.resident_bytes()
            time.sleep(0.01)
        looked_at.close()


def test_a_start_does_not_wait_for_who_made_the_artifact(tmp_path: Path) -> None:
    """It computes with what others leave, and may be stopped for long between the artifact's name and its end."""

    def not_found(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, not_found)
    with ArtifactWriter(str(tmp_path), INPUTS) as writer:
        writer.refuse("quantised")
        signal.alarm(5)
        try:
            with pytest.raises(Unsupported, match="quantised"):
                find(str(tmp_path), INPUTS)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        assert drop_unused(tmp_path, kept=0) == 0


def test_who_ends_after_its_artifact_has_its_name_leaves_the_next_ones_alone(tmp_path: Path) -> None:
    with ArtifactWriter(str(tmp_path), INPUTS) as first:
        first.refuse("quantised")
        second = ArtifactWriter(str(tmp_path), INPUTS)
        second.__enter__()
        second.append(memoryview(DATA))
    second.publish("skeleton", (), (), ())
    second.__exit__(None, None, None)
    assert is_found(tmp_path)


def test_one_that_was_tried_and_proved_nothing_is_no_good(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert not has_failed(path), "nobody has tried it"
    taken = find(str(tmp_path), INPUTS)
    assert taken is not None
    begin_trial(path, "first")
    begin_trial(path, "../second")
    assert not has_failed(path), "a start is under way"
    taken.release()
    assert has_failed(path), "those starts ended, and proved nothing"
    # One was told to end: that says nothing. The other one died.
    end_trials(tmp_path, "first")
    assert has_failed(path)
    end_trials(tmp_path, "../second")
    end_trials(tmp_path, "unknown")
    assert not has_failed(path)
    begin_trial(path, "third")
    mark_proven(path)
    begin_trial(path, "fourth")
    assert not has_failed(path), "a start that dies of something else says nothing of a proven one"
    mark_unfit(path)
    assert has_failed(path)
    assert is_unfit(path)


def test_the_proven_one_of_a_revision_that_was_used_last_is_found(tmp_path: Path) -> None:
    assert find_proven(tmp_path / "nowhere", INPUTS.revision) is None
    other = replace(INPUTS, flags={"dtype": "float32"})
    paths = [write(tmp_path), write(tmp_path, other), write(tmp_path, replace(INPUTS, revision="sha256:other"))]
    assert find_proven(tmp_path, INPUTS.revision) is None, "none is proven"
    for number, path in enumerate(paths):
        mark_proven(path)
        os.utime(path, (number, number))
    assert find_proven(tmp_path, INPUTS.revision) == paths[1]
    os.utime(paths[0], (9, 9))
    assert find_proven(tmp_path, INPUTS.revision) == paths[0]
    cut(paths[0])
    assert find_proven(tmp_path, INPUTS.revision) == paths[1]
    mark_unfit(paths[1])
    assert find_proven(tmp_path, INPUTS.revision) is None
    paths[0].with_name("gone-1").mkdir()
    paths[2].rename(paths[2].with_name("gone-2"))
    assert find_proven(tmp_path, "sha256:other") is None, "it is being removed"
    shutil.rmtree(paths[1])
    mark_proven(write(tmp_path, replace(other, revision="sha256:other")))
    assert find_proven(tmp_path, INPUTS.revision) is None


def lend(root: Path, name: str = "lent") -> Path:
    """Returns an artifact's files as a storage agent lends them."""
    made = write(root / "maker")
    lent = root / name
    lent.mkdir()
    for file in (MANIFEST, WEIGHTS):
        (made / file).chmod(0o444)
        (lent / file).hardlink_to(made / file)
    return lent


@pytest.mark.parametrize("can_link", [True, False])
def test_what_is_lent_is_linked_or_copied_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
) -> None:
    lent, root = lend(tmp_path), tmp_path / "node"

    def cannot_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    if not can_link:
        monkeypatch.setattr(os, "link", cannot_link)
    path = bring_in(str(root), INPUTS.key, lent)
    assert names(root) == {INPUTS.key}
    assert is_found(root)
    assert (path / WEIGHTS).samefile(lent / WEIGHTS) == can_link
    assert (path / WEIGHTS).read_bytes() == (lent / WEIGHTS).read_bytes()
    assert (path / WEIGHTS).stat().st_mode & 0o222 == 0
    # Whoever lent it may take it back.
    shutil.rmtree(lent)
    assert is_found(root)


def test_a_file_that_its_owner_may_write_to_is_copied(tmp_path: Path) -> None:
    lent = lend(tmp_path)
    (lent / WEIGHTS).chmod(0o644)
    path = bring_in(str(tmp_path / "node"), INPUTS.key, lent)
    assert not (path / WEIGHTS).samefile(lent / WEIGHTS)


def say_a_larger_size(path: Path) -> None:
    document = json.loads((path / MANIFEST).read_text())
    document["size_bytes"] += PAGE_BYTES
    replace_manifest(path, document)


def refuse(path: Path) -> None:
    replace_manifest(path, {"inputs": json.loads((path / MANIFEST).read_text())["inputs"], "refusal": "quantised"})


def be_of_another_revision(path: Path) -> None:
    document = json.loads((path / MANIFEST).read_text())
    document["inputs"]["revision"] = "sha256:other"
    replace_manifest(path, document)


def say_nothing_of_inputs(path: Path) -> None:
    replace_manifest(path, json.loads((path / MANIFEST).read_text()) | {"inputs": {"x": 1}})


def replace_manifest(path: Path, document: dict[str, Any]) -> None:
    (path / MANIFEST).unlink()
    (path / MANIFEST).write_text(json.dumps({"tensors": [], "matrices": [], "layouts": []} | document))


@pytest.mark.parametrize(
    "harm",
    [
        *(flip_in_place, cut, lose_weights, garble),
        *(say_a_larger_size, refuse, be_of_another_revision, say_nothing_of_inputs),
    ],
    ids=lambda harm: harm.__name__,
)
def test_what_is_lent_and_not_what_its_name_says_is_refused(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    lent = lend(tmp_path)
    (lent / MANIFEST).chmod(0o644)
    harm(lent)
    with pytest.raises(Corrupted):
        bring_in(str(tmp_path / "node"), INPUTS.key, lent)
    assert find(str(tmp_path / "node"), INPUTS) is None
    assert not list((tmp_path / "node").glob("*"))


def test_bringing_one_in_stops_when_it_is_told_and_one_process_does_it(tmp_path: Path) -> None:
    lent, root = lend(tmp_path), tmp_path / "node"

    def stop() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bring_in(str(root), INPUTS.key, lent, stop)
    assert names(root) == set()
    with ArtifactWriter(str(root), INPUTS), pytest.raises(BlockingIOError):
        bring_in(str(root), INPUTS.key, lent)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["inputs", "skeleton", "tensors", "matrices", "layouts", "size_bytes", "sha256", "refusal"]
                ),
                inner,
            )
        ),
    )
)
def test_what_is_not_a_manifest_is_refused(document: object) -> None:
    with pytest.raises(Corrupted):
        PackedManifest.from_json(json.dumps(document))
