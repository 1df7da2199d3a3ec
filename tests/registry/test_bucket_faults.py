"""Uploads to a real S3 through a network that fails: each either succeeds, or says what is wrong and can go on."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from helios.mesh.errors import Corrupted, HeliosError, Unavailable
from helios.registry.blob_stores import open_store
from helios.registry.blobs import BlobStore
from helios.registry.manifest import Digest
from helios.registry.offload import Stop
from helios.registry.settings import BlobStoreSettings
from helios.registry.state import StateDirectory
from tests.emulators.buckets import s3_client
from tests.emulators.faulty_proxy import (
    Fault,
    FaultyProxy,
    damaged_request,
    expired_token,
    lost_answer,
    reset_body,
    reset_request,
    status,
    wrong_length,
)
from tests.emulators.google import GoogleProxy, google
from tests.emulators.servers import Emulator
from tests.registry.tiny import sha256

pytestmark = pytest.mark.slow

PART_BYTES = 5 << 20
# Two parts, the second one short: they cross a proxy in Python.
LARGE_BYTES = PART_BYTES + 12_345


@pytest.fixture(params=["s3", pytest.param("google", marks=pytest.mark.soak)])
def proxy(request: pytest.FixtureRequest, seaweedfs_server: Emulator) -> Iterator[FaultyProxy]:
    is_google = request.param == "google"
    with google(seaweedfs_server) if is_google else FaultyProxy(seaweedfs_server.address) as opened:
        yield opened


@pytest.fixture
def prefix() -> str:
    return secrets.token_hex(4)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    state = StateDirectory(tmp_path / "state")
    state.root.mkdir()
    return state


Opened = Callable[..., AbstractContextManager[BlobStore]]


@pytest.fixture
def opened(
    seaweedfs_server: Emulator, seaweedfs_bucket: str, prefix: str, proxy: FaultyProxy, state: StateDirectory
) -> Opened:
    """Opens the store behind the proxy, as a registry that starts anew does."""
    server = proxy.emulator if isinstance(proxy, GoogleProxy) else seaweedfs_server.through(proxy.address)
    return opener(server, seaweedfs_bucket, prefix, state)


@pytest.fixture
def azure_proxy(azurite_server: Emulator) -> Iterator[FaultyProxy]:
    with FaultyProxy(azurite_server.address) as opened:
        yield opened


@pytest.fixture
def azure(
    azurite_server: Emulator, azurite_bucket: str, prefix: str, azure_proxy: FaultyProxy, state: StateDirectory
) -> Opened:
    """Opens a store of Azure's behind a proxy."""
    return opener(azurite_server.through(azure_proxy.address), azurite_bucket, prefix, state)


def opener(server: Emulator, bucket: str, prefix: str, state: StateDirectory) -> Opened:
    options = {name: SecretStr(value) for name, value in server.options.items()}

    def open_it(**more: Any) -> AbstractContextManager[BlobStore]:
        settings = BlobStoreSettings(
            url=f"{server.scheme}://{bucket}/{prefix}/models",
            options=options,
            part_bytes=PART_BYTES,
            concurrency=2,
            **more,
        )
        return open_store(settings, state, {})

    return open_it


def put(store: BlobStore, source: Path) -> Digest:
    with store.stage(source, is_owned=False, on_bytes=lambda _: None, stop=Stop()) as staged:
        staged.commit(lambda _: None, Stop())
        return staged.digest


def write(path: Path, size_bytes: int) -> Path:
    path.write_bytes(os.urandom(size_bytes))
    return path


def parts_sent(proxy: FaultyProxy) -> list[str]:
    return [target for method, target in proxy.requests if method == "PUT" and "partNumber=" in target]


LONG = pytest.mark.soak
AT_ONCE = 1_000
SIZES = [pytest.param(AT_ONCE, id="small"), pytest.param(LARGE_BYTES, id="large", marks=LONG)]


@pytest.mark.parametrize(
    ("size_bytes", "fault"),
    [
        pytest.param(AT_ONCE, status(500, method="PUT", times=2), id="small-500"),
        pytest.param(AT_ONCE, status(429, retry_after=1, method="PUT"), id="small-429"),
        pytest.param(AT_ONCE, reset_request(method="PUT"), id="small-reset-while-sending"),
        pytest.param(AT_ONCE, lost_answer(method="PUT"), id="small-answer-lost"),
        pytest.param(LARGE_BYTES, status(429, retry_after=1, method="PUT"), id="429", marks=LONG),
        pytest.param(LARGE_BYTES, reset_request(method="PUT"), id="reset-while-sending"),
        pytest.param(LARGE_BYTES, lost_answer(method="POST", part="uploadId="), id="answer-to-complete-lost"),
        pytest.param(LARGE_BYTES, status(500, method="PUT", times=2), id="500", marks=LONG),
        pytest.param(LARGE_BYTES, status(503, method="PUT", times=2), id="503", marks=LONG),
        pytest.param(LARGE_BYTES, lost_answer(method="PUT"), id="answer-lost", marks=LONG),
        pytest.param(LARGE_BYTES, status(500, method="POST", part="uploads"), id="500-at-the-beginning", marks=LONG),
    ],
)
def test_what_passes_is_passed_over(
    size_bytes: int, fault: Fault, opened: Opened, proxy: FaultyProxy, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", size_bytes)
    with opened() as store:
        proxy.inject(fault)
        digest = put(store, source)
        proxy.heal()
        with store.open(digest.hash) as file:
            assert file.read() == source.read_bytes()
    assert digest.hash == sha256(source)


@pytest.mark.parametrize("size_bytes", SIZES)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(status(500, method="PUT", times=2), id="500", marks=LONG),
        pytest.param(status(429, retry_after=1, method="PUT"), id="429", marks=LONG),
        pytest.param(reset_request(method="PUT"), id="reset-while-sending"),
        pytest.param(lost_answer(method="PUT"), id="answer-lost", marks=LONG),
        pytest.param(lost_answer(method="PUT", part="comp=blocklist"), id="answer-to-complete-lost", marks=LONG),
        pytest.param(status(503, method="PUT", part="comp=blocklist", times=2), id="503-at-the-end", marks=LONG),
    ],
)
def test_what_passes_is_passed_over_at_azure(
    size_bytes: int, fault: Fault, azure: Opened, azure_proxy: FaultyProxy, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", size_bytes)
    with azure() as store:
        azure_proxy.inject(fault)
        digest = put(store, source)
        azure_proxy.heal()
        with store.open(digest.hash) as file:
            assert file.read() == source.read_bytes()
    assert digest.hash == sha256(source)


@pytest.mark.parametrize("size_bytes", SIZES)
def test_expired_credentials_are_named_at_azure(
    size_bytes: int, azure: Opened, azure_proxy: FaultyProxy, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", size_bytes)
    with azure() as store:
        azure_proxy.inject(expired_token(method="PUT", times=100))
        with pytest.raises(Unavailable) as caught:
            put(store, source)
        assert caught.value.reason == "BLOB_STORE_DENIED"
        assert "secret" not in str(caught.value).lower()
        azure_proxy.heal()
        assert list(store.scan()) == []
        # Credentials that are good again go on.
        assert put(store, source).hash == sha256(source)


@pytest.mark.parametrize("size_bytes", [1_000, LARGE_BYTES], ids=["small", "large"])
def test_expired_credentials_are_named(size_bytes: int, opened: Opened, proxy: FaultyProxy, tmp_path: Path) -> None:
    source = write(tmp_path / "source", size_bytes)
    with opened() as store:
        proxy.inject(expired_token(method="PUT", times=100), expired_token(method="POST", times=100))
        with pytest.raises(Unavailable) as caught:
            put(store, source)
        assert caught.value.reason == "BLOB_STORE_DENIED"
        assert "secret" not in str(caught.value).lower()
        assert list(store.scan()) == []


@pytest.mark.parametrize("proxy", ["s3", "google"], indirect=True)
def test_an_upload_goes_on_where_it_was_cut(opened: Opened, proxy: FaultyProxy, tmp_path: Path) -> None:
    source = write(tmp_path / "source", LARGE_BYTES)
    with opened(retry_seconds=1) as store:
        proxy.inject(status(500, method="PUT", part="partNumber=2", times=100))
        with pytest.raises(Unavailable):
            put(store, source)
        assert list(store.scan()) == []
    before = {target.split("partNumber=")[1][0] for target in parts_sent(proxy)}
    proxy.heal()
    proxy.requests.clear()
    # Another process: what it knows is the journal.
    with opened() as store:
        digest = put(store, source)
        again = {target.split("partNumber=")[1][0] for target in parts_sent(proxy)}
        assert "1" in before
        assert "1" not in again
        assert "2" in again
        with store.open(digest.hash) as file:
            assert file.read() == source.read_bytes()


def test_a_part_that_the_wire_changed_is_refused(opened: Opened, proxy: FaultyProxy, tmp_path: Path) -> None:
    source = write(tmp_path / "source", LARGE_BYTES)
    proxy.inject(damaged_request(part="partNumber=2"))
    with opened() as store:
        try:
            digest = put(store, source)
        except HeliosError:
            assert list(store.scan()) == []
            return
        with store.open(digest.hash) as file:
            assert file.read() == source.read_bytes()


def test_reading_through_faults(opened: Opened, proxy: FaultyProxy, tmp_path: Path) -> None:
    source = write(tmp_path / "source", LARGE_BYTES)
    with opened() as store:
        digest = put(store, source)
        for fault in (reset_body(after_bytes=70_000), status(500, method="GET"), status(503, method="GET")):
            proxy.inject(fault)
            with store.open(digest.hash) as file:
                file.seek(1 << 18)
                assert file.read(300_000) == source.read_bytes()[1 << 18 : (1 << 18) + 300_000]
        proxy.heal()
        proxy.inject(wrong_length(missing_bytes=5, times=20))
        with store.open(digest.hash) as file, pytest.raises((Corrupted, Unavailable)):
            file.read(300_000)


@pytest.fixture
def judge(seaweedfs_server: Emulator) -> Iterator[Any]:
    """The bucket's server, asked by a client that is not the code under test."""
    with closing(s3_client(seaweedfs_server)) as client:
        yield client


@pytest.mark.parametrize("proxy", ["s3", "google"], indirect=True)
def test_uploads_that_nobody_finishes_are_swept(
    judge: Any, seaweedfs_bucket: str, prefix: str, opened: Opened, proxy: FaultyProxy, *, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", LARGE_BYTES)
    judge.create_multipart_upload(Bucket=seaweedfs_bucket, Key=f"{prefix}/models/sha256/ab/{'ab' * 32}")
    # Somebody else's, beside the prefix: not the registry's to drop.
    judge.create_multipart_upload(Bucket=seaweedfs_bucket, Key=f"{prefix}/others/sha256/ab/{'ab' * 32}")
    with opened(retry_seconds=1) as store:
        proxy.inject(status(500, method="PUT", part="partNumber=2", times=100))
        with pytest.raises(Unavailable):
            put(store, source)
        proxy.heal()
        now = datetime.now(UTC)
        assert store.sweep(before=now - timedelta(hours=1)) == 0
        assert store.sweep(before=now + timedelta(minutes=1)) == 2
        assert store.sweep(before=now + timedelta(minutes=1)) == 0
    left = judge.list_multipart_uploads(Bucket=seaweedfs_bucket, Prefix=prefix).get("Uploads", [])
    assert [each["Key"] for each in left] == [f"{prefix}/others/sha256/ab/{'ab' * 32}"]
