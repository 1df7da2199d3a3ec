"""Fetching from real object stores, also through a network that fails: the right bytes, or an error that says why."""

import hashlib
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from helios.mesh.errors import DigestMismatch, PermissionDenied, Unauthenticated, Unavailable
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.machine import RetryPolicy
from helios.mesh.transfer.objects import open_object_store
from helios.mesh.transfer.order import Transfer, TransferOptions, Wanted
from helios.storage.manifest import Digest
from helios.storage.object_source import ObjectStoreSource
from tests.emulators.faulty_proxy import (
    Fault,
    FaultyProxy,
    expired_token,
    flipped_bit,
    reset_body,
    slow_drip,
    status,
    wrong_etag,
    wrong_length,
)
from tests.emulators.google import google
from tests.emulators.servers import Emulator
from tests.storage.harness import Mesh, digest_of

pytestmark = pytest.mark.slow

CHUNK = 128 << 10
CONTENT = random.Random(12).randbytes(5 * CHUNK + 3)
DIGEST = digest_of(CONTENT)
OPTIONS = TransferOptions(
    chunk_bytes=CHUNK,
    in_flight=2,
    stall_seconds=0.5,
    stall_bytes=128 << 10,
    retry=RetryPolicy(max_attempts=5, base_seconds=0.05, cap_seconds=0.5),
)
SECRETS = ("aws_access_key_id", "aws_secret_access_key", "azure_storage_account_key", "google_bearer_token")


def _put(emulator: Emulator, bucket: str) -> str:
    """Stores the blob as a registry does; returns the store's URL."""
    url = f"{emulator.scheme}://{bucket}/{secrets.token_hex(4)}/models"
    store = open_object_store(url, options=emulator.options)
    obstore.put(store, f"sha256/{DIGEST.hash[:2]}/{DIGEST.hash}", CONTENT)
    return url


async def test_an_agent_reads_s3_with_credentials_of_its_own(
    mesh: Mesh, seaweedfs_server: Emulator, seaweedfs_bucket: str
) -> None:
    await _read(mesh, seaweedfs_server, seaweedfs_bucket)


async def test_an_agent_reads_azure_with_credentials_of_its_own(
    mesh: Mesh, azurite_server: Emulator, azurite_bucket: str
) -> None:
    await _read(mesh, azurite_server, azurite_bucket)


async def test_an_agent_reads_google_with_credentials_of_its_own(
    mesh: Mesh, seaweedfs_server: Emulator, seaweedfs_bucket: str
) -> None:
    with google(seaweedfs_server) as proxy:
        await _read(mesh, proxy.emulator, seaweedfs_bucket)


async def _read(mesh: Mesh, emulator: Emulator, bucket: str) -> None:
    url = _put(emulator, bucket)
    told = {name: value for name, value in emulator.options.items() if name not in SECRETS}
    own = {name: value for name, value in emulator.options.items() if name in SECRETS}
    mesh.shelf.locations = [((mesh.directory / "elsewhere").as_uri(), {}), (url, told)]
    revision = mesh.shelf.add({"model.safetensors": CONTENT})
    async with (
        mesh.agent(credentials={emulator.scheme: own}) as agent,
        agent.client.materialize(revision, holder="test") as lent,
    ):
        assert Path(lent.path, "model.safetensors").read_bytes() == CONTENT


@pytest.fixture
def proxy(seaweedfs_server: Emulator) -> Iterator[FaultyProxy]:
    with FaultyProxy(seaweedfs_server.address) as opened:
        yield opened


@pytest.fixture
def source(seaweedfs_server: Emulator, seaweedfs_bucket: str, proxy: FaultyProxy) -> ObjectStoreSource:
    return ObjectStoreSource(_put(seaweedfs_server, seaweedfs_bucket), seaweedfs_server.through(proxy.address).options)


def _fetch(source: ObjectStoreSource, target: Path, digest: Digest = DIGEST) -> None:
    wanted = Wanted(digest.size_bytes, digest.hash)
    Downloader(OPTIONS).fetch(Transfer(source.ranged(digest).source, target, wanted))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(status(500, method="GET", times=3), id="500"),
        pytest.param(status(503, method="GET", times=3), id="503"),
        pytest.param(status(429, retry_after=1, method="GET", times=2), id="429"),
        pytest.param(status(500, method="HEAD", times=2), id="500-at-the-beginning"),
        pytest.param(reset_body(after_bytes=70_000, times=3), id="reset-mid-chunk"),
        pytest.param(wrong_length(missing_bytes=7, times=2), id="too-short"),
        pytest.param(slow_drip(bytes_per_second=60_000, times=1), id="slow-drip"),
        pytest.param(wrong_etag(method="GET"), id="wrong-etag"),
    ],
)
def test_a_network_that_fails_costs_time_and_no_byte(
    source: ObjectStoreSource, proxy: FaultyProxy, tmp_path: Path, fault: Fault
) -> None:
    proxy.inject(fault)
    _fetch(source, tmp_path / "blob")
    assert hashlib.sha256((tmp_path / "blob").read_bytes()).hexdigest() == DIGEST.hash
    assert proxy.broken_count > 0


def test_an_outage_that_lasts_is_said_and_what_came_is_kept(
    source: ObjectStoreSource, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.inject(status(503, method="GET", times=1000))
    with pytest.raises(Unavailable):
        _fetch(source, tmp_path / "blob")
    assert (tmp_path / "blob").exists()
    proxy.heal()
    _fetch(source, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == CONTENT


def test_a_flipped_bit_is_never_kept(source: ObjectStoreSource, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.inject(flipped_bit(at=1000))
    with pytest.raises(DigestMismatch):
        _fetch(source, tmp_path / "blob")
    assert list(tmp_path.iterdir()) == []


def test_an_expired_token_is_not_tried_again(source: ObjectStoreSource, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.inject(expired_token(times=1000))
    with pytest.raises((PermissionDenied, Unauthenticated, Unavailable)) as caught:
        _fetch(source, tmp_path / "blob")
    assert "helios-tests" not in str(caught.value.message), "no credential is shown"
