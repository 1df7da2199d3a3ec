"""Making buckets in emulators: the one thing that neither obstore nor the registry does."""

import base64
import hashlib
import hmac
import http.client
import secrets
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import botocore.session
from botocore.config import Config

from tests.emulators.servers import AZURITE_ACCOUNT, AZURITE_KEY, Emulator


def make_bucket(emulator: Emulator, name: str = "") -> str:
    """Makes a bucket (or container) and returns its name; a new name where none is given."""
    name = name or f"tests-{secrets.token_hex(6)}"
    if emulator.scheme == "s3":
        with closing(s3_client(emulator)) as client:
            client.create_bucket(Bucket=name)
    else:
        _make_container(emulator, name)
    return name


def s3_client(emulator: Emulator) -> Any:
    """Returns a botocore client, to be closed: a judge that is not the code under test."""
    return botocore.session.Session().create_client(
        "s3",
        region_name=emulator.options["aws_region"],
        endpoint_url=emulator.options["aws_endpoint"],
        aws_access_key_id=emulator.options["aws_access_key_id"],
        aws_secret_access_key=emulator.options["aws_secret_access_key"],
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 3}),
    )


def _make_container(emulator: Emulator, name: str) -> None:
    """Sends Create Container, signed with the account's key. Source: Azure Storage, "Authorize with Shared Key"."""
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": date, "x-ms-version": "2021-12-02"}
    canonical = "".join(f"{key}:{value}\n" for key, value in sorted(headers.items()))
    path = f"/{AZURITE_ACCOUNT}/{name}"
    text = "PUT\n" + "\n" * 11 + canonical + f"/{AZURITE_ACCOUNT}{path}\nrestype:container"
    signature = hmac.new(base64.b64decode(AZURITE_KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {AZURITE_ACCOUNT}:{base64.b64encode(signature).decode()}"
    connection = http.client.HTTPConnection(emulator.address, timeout=10)
    try:
        connection.request("PUT", f"{path}?restype=container", headers={**headers, "Content-Length": "0"})
        answer = connection.getresponse()
        assert answer.status == 201, answer.read()
        answer.read()
    finally:
        connection.close()
