"""Who asks Google: a service account's key gives tokens, one for all parts, and one that is refused says so."""

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from helios.mesh.errors import Unavailable
from helios.registry.google_parts import GoogleAccess, GoogleParts
from helios.registry.upload_journal import Upload
from tests.emulators.faulty_proxy import Fault, FaultyProxy, Reply
from tests.emulators.google import TOKEN, google
from tests.emulators.servers import Emulator

pytestmark = pytest.mark.slow

PART = os.urandom(5 << 20)


@pytest.fixture
def tokens() -> Iterator[FaultyProxy]:
    """What gives tokens, as it is told."""
    with FaultyProxy("127.0.0.1:1") as server:
        yield server


@pytest.fixture
def account(tokens: FaultyProxy) -> dict[str, str]:
    """A service account's key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {
        "type": "service_account",
        "client_email": "registry@tests.example",
        "private_key_id": "1",
        "private_key": key.decode(),
        "token_uri": f"http://{tokens.address}/token",
    }


def answer(status: int, document: dict[str, object]) -> Fault:
    content = json.dumps(document).encode()
    return Fault(times=1, answer=Reply(status, [("Content-Type", "application/json")], iter((content,))))


@pytest.mark.parametrize("is_file", [False, True], ids=["key", "file"])
def test_one_token_serves_all_parts(
    is_file: bool,
    seaweedfs_server: Emulator,
    seaweedfs_bucket: str,
    *,
    tokens: FaultyProxy,
    account: dict[str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / "key.json").write_text(json.dumps(account))
    tokens.inject(answer(200, {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}))
    with google(seaweedfs_server) as proxy:
        access = GoogleAccess(
            base_url=f"http://{proxy.address}",
            bearer_token=None,
            key=None if is_file else json.dumps(account),
            key_file=str(tmp_path / "key.json"),
            is_anonymous=False,
        )
        assert "PRIVATE" not in repr(access)
        parts = GoogleParts(seaweedfs_bucket, secrets.token_hex(4), access, request_seconds=30)
        key = f"sha256/ab/{'ab' * 32}"
        upload = Upload("gs://x", key, parts.begin(key), len(PART))
        assert [each.key for each in parts.unfinished()] == [key]
        tags = {number: parts.put_part(upload, number, PART, "") for number in (1, 2)}
        parts.complete(upload, tags)
        assert list(parts.unfinished()) == []
        parts.abort(upload)
        parts.close()
    assert tokens.requests == [("POST", "/token")]


def test_a_refused_key_is_named_and_not_shown(tokens: FaultyProxy, account: dict[str, str]) -> None:
    tokens.inject(answer(400, {"error": "invalid_grant", "error_description": "hidden"}))
    access = GoogleAccess("http://127.0.0.1:1", None, json.dumps(account), None, is_anonymous=False)
    parts = GoogleParts("bucket", "", access, request_seconds=5)
    with pytest.raises(Unavailable) as caught:
        parts.begin("x")
    assert caught.value.reason == "BLOB_STORE_DENIED"
    assert "hidden" not in str(caught.value)
    parts.close()
