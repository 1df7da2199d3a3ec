"""The promises of ``BlobStore``, held by every implementation: directory, obstore's own, and real servers.

What ``emulators`` start is real: SeaweedFS for S3, and for Google behind a proxy that speaks its dialect; Azurite for
Azure.
"""

import errno
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from helios.mesh.errors import BlobNotFound, Conflict, HeliosError, InvalidRequest, PreconditionFailed, Unavailable
from helios.registry.blob_stores import StoreOptions, open_store
from helios.registry.collection import prefixes
from helios.registry.directory_store import DirectoryStore
from helios.registry.manifest import Digest
from helios.registry.object_store import ObjectStore, key_of
from helios.registry.offload import Stop, Stopped
from helios.registry.ownership import Claim
from helios.registry.part_upload import UploadLimits
from helios.registry.settings import BlobStoreSettings
from helios.registry.state import StateDirectory
from tests.emulators.faulty_proxy import FaultyProxy, status
from tests.emulators.google import google
from tests.emulators.servers import Emulator
from tests.registry.tiny import sha256

PART_BYTES = 5 << 20
# A whole part and a bit.
LARGE_BYTES = PART_BYTES + 12_345
MISSING = "f" * 64


@dataclass
class Subject:
    """A store under test, and its keys as an outsider lists them."""

    store: DirectoryStore | ObjectStore
    keys: Callable[[], set[str]]

    def put(self, source: Path, on_bytes: Callable[[int], None] = lambda _: None, stop: Stop | None = None) -> Digest:
        stop = stop or Stop()
        with self.store.stage(source, is_owned=False, on_bytes=on_bytes, stop=stop) as staged:
            staged.commit(on_bytes, stop)
            return staged.digest


def directory_subject(root: Path) -> Subject:
    store = DirectoryStore(root)
    store.prepare()
    return Subject(store, lambda: {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()})


def keys_of(store: Any) -> set[str]:
    return {each["path"] for batch in store.list() for each in batch}


def obstore_subject(store: Any) -> Subject:
    blobs = ObjectStore(store, url="memory://", options={}, limits=UploadLimits(PART_BYTES, 2))
    return Subject(blobs, partial(keys_of, store))


def emulated_subject(server: Emulator, bucket: str, state: StateDirectory) -> Iterator[Subject]:
    options = {name: SecretStr(value) for name, value in server.options.items()}
    url = f"{server.scheme}://{bucket}/{secrets.token_hex(4)}/models"
    settings = BlobStoreSettings(url=url, options=options, part_bytes=PART_BYTES, concurrency=2, retry_seconds=5)
    with open_store(settings, state, {}) as store:
        assert isinstance(store, ObjectStore)
        subject = Subject(store, partial(keys_of, store._store))
        yield subject
        # pytest keeps it for longer than the check for open connections waits.
        vars(subject).clear()
        del store


@pytest.fixture(
    scope="session",
    params=[
        "directory",
        "obstore-local",
        "obstore-memory",
        pytest.param("s3", marks=pytest.mark.slow),
        pytest.param("google", marks=pytest.mark.slow),
        pytest.param("azure", marks=pytest.mark.soak),
    ],
)
def kind(request: pytest.FixtureRequest) -> Iterator[tuple[str, Emulator | None, str]]:
    """Names an implementation, its server and bucket; for the session, so that no test is blamed for a server."""
    name = {"s3": "seaweedfs", "google": "seaweedfs", "azure": "azurite"}.get(request.param)
    if name is None:
        yield request.param, None, ""
        return
    server, bucket = request.getfixturevalue(f"{name}_server"), request.getfixturevalue(f"{name}_bucket")
    if request.param != "google":
        yield request.param, server, bucket
        return
    with google(server) as proxy:
        yield request.param, proxy.emulator, bucket


@pytest.fixture
def subject(kind: tuple[str, Emulator | None, str], tmp_path: Path) -> Iterator[Subject]:
    from obstore.store import LocalStore, MemoryStore  # noqa: PLC0415 - not by those who leave this file out

    state = StateDirectory(tmp_path / "state")
    state.root.mkdir()
    name, server, bucket = kind
    if server is not None:
        yield from emulated_subject(server, bucket, state)
        return
    match name:
        case "directory":
            yield directory_subject(tmp_path / "blobs")
        case "obstore-local":
            yield obstore_subject(LocalStore(str(tmp_path / "blobs"), mkdir=True))
        case "obstore-memory":
            yield obstore_subject(MemoryStore())


@pytest.fixture(params=[1_000, LARGE_BYTES], ids=["small", "large"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(request.param))
    return path


def test_stores_a_file_under_its_sha256(subject: Subject, source: Path) -> None:
    counts: list[int] = []
    digest = subject.put(source, counts.append)
    assert (digest.hash, digest.size_bytes) == (sha256(source), source.stat().st_size)
    assert subject.store.size(digest.hash) == digest.size_bytes
    assert subject.keys() == {key_of(digest.hash)}
    assert sum(counts) == digest.size_bytes
    with subject.store.open(digest.hash) as file:
        assert file.read() == source.read_bytes()
    assert source.exists()


def test_storing_again_changes_nothing(subject: Subject, source: Path) -> None:
    digest = subject.put(source)
    before = {blob.hash: blob.modified_at for blob in subject.store.scan()}
    assert subject.put(source) == digest
    assert subject.store.size(digest.hash) == digest.size_bytes
    assert {blob.hash for blob in subject.store.scan()} == set(before)


def test_a_blob_of_the_wrong_size_is_replaced(subject: Subject, tmp_path: Path, source: Path) -> None:
    digest = subject.put(source)
    if isinstance(subject.store, DirectoryStore):
        path = subject.store.path(digest.hash)
        path.chmod(0o644)
        path.write_bytes(b"torn")
    else:
        assert isinstance(subject.store, ObjectStore)
        subject.store._store.put(key_of(digest.hash), b"torn")
    assert subject.store.size(digest.hash) == 4
    subject.put(source)
    with subject.store.open(digest.hash) as file:
        assert file.read() == source.read_bytes()


def test_reads_ranges(subject: Subject, source: Path) -> None:
    digest = subject.put(source)
    content = source.read_bytes()
    with subject.store.open(digest.hash) as file:
        assert file.seek(0, 2) == len(content)
        assert file.read() == b""
        for position in (0, 7, len(content) - 3):
            assert file.seek(position) == position
            assert file.read(100) == content[position : position + 100]


def test_what_is_not_there_is_said_so(subject: Subject) -> None:
    assert subject.store.size(MISSING) == -1
    with pytest.raises(BlobNotFound):
        subject.store.open(MISSING)


def test_lists_and_deletes(subject: Subject, tmp_path: Path) -> None:
    digests = []
    for number in range(5):
        path = tmp_path / f"blob-{number}"
        path.write_bytes(secrets.token_bytes(100 + number))
        digests.append(subject.put(path))
    # A clock of a server may differ by a second; that of an object store has no fractions.
    now = datetime.now(UTC)
    found = list(subject.store.scan())
    assert {(blob.hash, blob.size_bytes) for blob in found} == {(each.hash, each.size_bytes) for each in digests}
    assert all(abs(blob.modified_at - now) < timedelta(minutes=1) for blob in found)
    gone = [each.hash for each in digests[:3]]
    subject.store.delete([*gone, MISSING])
    subject.store.delete(gone)
    assert {blob.hash for blob in subject.store.scan()} == {each.hash for each in digests[3:]}


def test_a_file_that_changes_between_hashing_and_storing_is_no_blob(subject: Subject, source: Path) -> None:
    if isinstance(subject.store, DirectoryStore):
        # It hashes the copy that it keeps.
        digest = Digest(sha256(source), source.stat().st_size)
        with subject.store.stage(source, is_owned=False, on_bytes=lambda _: None, stop=Stop()) as staged:
            source.write_bytes(b"another")
            staged.commit(lambda _: None, Stop())
        assert {blob.hash for blob in subject.store.scan()} == {digest.hash}
        return
    with subject.store.stage(source, is_owned=False, on_bytes=lambda _: None, stop=Stop()) as staged:
        content = bytearray(source.read_bytes())
        content[-1] ^= 1
        source.write_bytes(content)
        with pytest.raises(Conflict) as caught:
            staged.commit(lambda _: None, Stop())
    assert caught.value.reason == "SOURCE_CHANGED"
    assert subject.keys() == set()


def test_stopping_leaves_nothing_to_see(subject: Subject, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(24 << 20))
    stop = Stop()
    total = source.stat().st_size
    counts: list[int] = []

    def count(done: int) -> None:
        counts.append(done)
        # In the middle of what takes long: of the copy, or of the upload after the hash was taken.
        if sum(counts) >= total // 2 and (isinstance(subject.store, DirectoryStore) or -total in counts):
            stop.set()

    with pytest.raises(Stopped):
        subject.put(source, count, stop)
    assert subject.keys() == set()
    assert list(subject.store.scan()) == []


def test_two_at_once_make_one_blob(subject: Subject, source: Path) -> None:
    errors: list[HeliosError] = []

    def put() -> None:
        try:
            subject.put(source)
        except HeliosError as error:
            errors.append(error)

    threads = [threading.Thread(target=put) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with subject.store.open(sha256(source)) as file:
        assert file.read() == source.read_bytes()
    assert subject.keys() == {key_of(sha256(source))}


def test_a_missing_source_is_a_conflict(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(Conflict):
        subject.put(tmp_path / "nothing")


def test_sweeps_nothing_that_is_young(subject: Subject, source: Path) -> None:
    subject.put(source)
    assert subject.store.sweep(before=datetime.now(UTC) - timedelta(hours=1)) == 0
    assert subject.keys() == {key_of(sha256(source))}


def test_lists_by_the_beginning_of_hashes(subject: Subject, tmp_path: Path) -> None:
    path, hashes = tmp_path / "blob", set[str]()
    for number in range(12):
        path.write_bytes(str(number).encode())
        hashes.add(subject.put(path).hash)
    for count in (0, 5_000, 100_000):
        portions = [{blob.hash for blob in subject.store.scan(prefix)} for prefix in prefixes(count)]
        assert sum(map(len, portions)) == len(hashes)
        assert set().union(*portions) == hashes
    some = min(hashes)
    assert {blob.hash for blob in subject.store.scan(some[:2])} == {each for each in hashes if each[:2] == some[:2]}


def test_a_store_is_one_database_s(subject: Subject) -> None:
    now = datetime.now(UTC)
    one, two = Claim(subject.store, "one"), Claim(subject.store, "two")
    for _ in range(2):
        one.require(now)
    for name in ("", "two", "three"):
        with pytest.raises(PreconditionFailed, match="belong to the database one") as caught:
            two.require(now, take_over_from=name)
        assert caught.value.reason == "BLOB_STORE_OWNED"
    for _ in range(2):
        two.require(now, take_over_from="one")
    with pytest.raises(PreconditionFailed, match="two"):
        one.require(now)
    assert list(subject.store.scan()) == []


def test_of_two_databases_that_start_together_one_has_the_store(subject: Subject) -> None:
    winners: list[str] = []

    def start(name: str) -> None:
        with suppress(PreconditionFailed):
            Claim(subject.store, name).require(datetime.now(UTC))
            winners.append(name)

    threads = [threading.Thread(target=start, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1 or isinstance(subject.store, DirectoryStore), "a directory is locked beforehand"
    assert json.loads(subject.store.read_owner() or b"")["database"] in winners


def test_an_owner_that_nobody_can_read_is_somebody(subject: Subject) -> None:
    subject.store.replace_owner(b"\xff torn")
    with pytest.raises(PreconditionFailed, match="unknown"):
        Claim(subject.store, "one").require(datetime.now(UTC))


def test_other_files_of_the_bucket_are_left_alone(tmp_path: Path) -> None:
    from obstore.store import MemoryStore  # noqa: PLC0415

    raw = MemoryStore()
    subject = obstore_subject(raw)
    for key in ("readme", "sha256/notes", f"sha256/aa/{'b' * 64}", f"sha256/bb/{'b' * 63}"):
        raw.put(key, b"x")
    assert list(subject.store.scan()) == []


def test_a_directory_has_one_registry(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    settings = BlobStoreSettings(url=str(tmp_path / "elsewhere"))
    with open_store(settings, state, {}) as store:
        assert store.url == f"file://{tmp_path}/elsewhere"
        with pytest.raises(HeliosError) as caught, open_store(settings, state, {}):
            pass
        assert caught.value.reason == "BLOB_STORE_IN_USE"
    with open_store(BlobStoreSettings(), state, {}) as store:
        assert store.url == state.blobs.as_uri()


def test_a_move_from_another_disk_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = directory_subject(tmp_path / "blobs")
    source = tmp_path / "source"
    source.write_bytes(b"owned")

    def refuse(self: Path, target: Path) -> Path:
        if self == source:
            raise OSError(errno.EXDEV, "another disk")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", refuse)
    with subject.store.stage(source, is_owned=True, on_bytes=lambda _: None, stop=Stop()) as staged:
        staged.commit(lambda _: None, Stop())
    assert subject.store.size(sha256(source)) == 5


@pytest.mark.parametrize(
    "url",
    ["ftp://x/y", "relative/path", "s3://", "s3://key:secret@bucket/x", "s3://bucket/x?secret=1", "file://host/x"],
)
def test_urls_that_are_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught, open_store(BlobStoreSettings(url=url), StateDirectory(tmp_path), {}):
        pass
    assert caught.value.reason == "INVALID_BLOB_STORE"
    assert "secret" not in caught.value.message


def test_readers_are_told_no_secret() -> None:
    options = {"aws_secret_access_key": SecretStr("hidden"), "some_new_option": SecretStr("hidden")}
    environment = {
        "AWS_ACCESS_KEY_ID": "hidden",
        "AWS_SESSION_TOKEN": "hidden",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:8333",
        "AWS_REGION": "eu-central-1",
        "AZURE_STORAGE_ACCOUNT_NAME": "models",
        "AZURE_STORAGE_ACCOUNT_KEY": "hidden",
        "GOOGLE_SERVICE_ACCOUNT_KEY": "hidden",
    }
    found = StoreOptions(options, environment)
    assert found.public("s3") == {"aws_endpoint": "http://127.0.0.1:8333", "aws_region": "eu-central-1"}
    assert found.public("az") == {"azure_storage_account_name": "models"}
    assert found.public("gs") == {}
    assert StoreOptions({"aws_endpoint": SecretStr("http://user:hidden@host")}, {}).public("s3") == {}


def test_settings_go_before_the_environment() -> None:
    found = StoreOptions({"AWS_Region": SecretStr("here")}, {"AWS_REGION": "there", "AWS_DEFAULT_REGION": "nowhere"})
    assert found.find("aws_region", "aws_default_region") == "here"
    assert found.find("aws_default_region") == "nowhere"
    assert found.find("aws_endpoint") is None


def test_settings_show_no_secret() -> None:
    settings = BlobStoreSettings(url="s3://b", options={"aws_secret_access_key": SecretStr("hidden")})
    assert "hidden" not in settings.model_dump_json()
    assert "hidden" not in repr(settings)


@pytest.mark.parametrize("option", ["key", "token"])
def test_google_is_asked_below_the_prefix(option: str, tmp_path: Path) -> None:
    with FaultyProxy("127.0.0.1:1") as server:
        server.inject(status(404, times=10))
        address = f"http://{server.address}"
        account = {"gcs_base_url": address, "disable_oauth": True}
        account |= {"client_email": "", "private_key": "", "private_key_id": ""}
        options = {
            "key": {"google_service_account_key": json.dumps(account)},
            "token": {"google_base_url": address, "google_bearer_token": "hidden"},
        }[option] | {"google_allow_http": "true"}
        secret = {name: SecretStr(value) for name, value in options.items()}
        settings = BlobStoreSettings(url="gs://bucket/some/models", options=secret, retry_seconds=1)
        with open_store(settings, StateDirectory(tmp_path), {}) as store:
            assert store.url == "gs://bucket/some/models"
            assert store.options == ({"google_base_url": address} if option == "token" else {})
            assert store.size(MISSING) == -1
            with pytest.raises(Unavailable, match="HTTP 404"):
                store.sweep(before=datetime.now(UTC))
        del store
        assert server.requests == [
            ("HEAD", f"/bucket/some%2Fmodels%2F{key_of(MISSING).replace('/', '%2F')}"),
            ("GET", "/bucket?uploads&prefix=some%2Fmodels%2Fsha256%2F"),
        ]


@pytest.mark.parametrize("key", ["not JSON", '{"type": "service_account"}'])
def test_a_key_of_google_s_that_is_none_is_refused_and_not_shown(key: str, tmp_path: Path) -> None:
    settings = BlobStoreSettings(url="gs://bucket/x", options={"google_service_account_key": SecretStr(key)})
    with pytest.raises(InvalidRequest) as caught, open_store(settings, StateDirectory(tmp_path), {}):
        pass
    assert caught.value.reason == "INVALID_BLOB_STORE"
    assert 'service_account"' not in str(caught.value)
