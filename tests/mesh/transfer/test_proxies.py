"""Blobs through the environment's proxies, past them where NO_PROXY says so, and refusals that say whose they are."""

import base64
import hashlib
import random
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from helios.mesh.errors import InvalidRequest, Unavailable
from helios.mesh.identity import CertificateAuthority
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.http import HttpSource
from helios.mesh.transfer.machine import RetryPolicy
from helios.mesh.transfer.order import Transfer, TransferOptions, Wanted
from helios.mesh.transfer.proxies import environment_proxy, parse_proxy
from tests.mesh.transfer.blob_server import serve_blob
from tests.mesh.transfer.forward_proxy import ForwardProxy, serve_proxy

CONTENT = random.Random(8).randbytes(500_000)
WANTED = Wanted(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
OPTIONS = TransferOptions(chunk_bytes=100_000, retry=RetryPolicy(max_attempts=3, base_seconds=0.01))
BASIC = f"Basic {base64.b64encode(b'somebody:pass/word').decode()}"


def _use(monkeypatch: pytest.MonkeyPatch, proxy: ForwardProxy, *, user: str = "", no_proxy: str = "") -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://{user}{proxy.address}")
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", no_proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)


def _fetch(url: str, target: Path, tls: ssl.SSLContext | None = None) -> None:
    Downloader(OPTIONS).fetch(Transfer(HttpSource(url, tls=tls), target, WANTED))
    assert target.read_bytes() == CONTENT


def test_plain_urls_are_asked_of_the_proxy_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_blob(CONTENT) as server, serve_proxy() as proxy:
        _use(monkeypatch, proxy)
        url = server.url.replace("127.0.0.1", "far.example")
        _fetch(f"{url}?signature=1", tmp_path / "blob")
        assert set(proxy.seen) == {("GET", f"{url}?signature=1")}
        assert len(proxy.seen) == len(server.requests) == 6, "what the blob is, and its five chunks"


def test_encrypted_urls_come_through_a_tunnel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = CertificateAuthority.open(tmp_path / "ca").issue("storage", tmp_path / "pki")
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(identity.certificate, identity.key)
    # A name that only the proxy can look up, and that the certificate has: nobody in between reads what comes.
    with serve_blob(CONTENT, tls=there) as server, serve_proxy(authorization=BASIC) as proxy:
        _use(monkeypatch, proxy, user="somebody:pass%2Fword@")
        host = f"storage.helios.internal:{urlsplit(server.url).port}"
        _fetch(f"https://{host}/blob", tmp_path / "blob", tls=ssl.create_default_context(cafile=identity.ca))
        assert set(proxy.seen) == {("CONNECT", host)}
        count = len(proxy.seen)
        source = HttpSource(f"https://{host}/blob", tls=ssl.create_default_context(cafile=identity.ca))
        state = source.describe()
        source.read(state, 0, state.size_bytes, bytearray().extend)
        source.close()
        assert len(proxy.seen) == count + 1, "a tunnel is kept"
        assert all("Proxy-Authorization" not in request.headers for request in server.requests)


def test_no_proxy_is_asked_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_blob(CONTENT) as server, serve_proxy() as proxy:
        _use(monkeypatch, proxy, no_proxy="127.0.0.1,.example")
        _fetch(server.url, tmp_path / "blob")
        assert proxy.seen == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_asked_once(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_proxy(authorization=BASIC) as proxy:
        _use(monkeypatch, proxy, user="somebody:secret@")
        with pytest.raises(InvalidRequest, match=r"proxy 127.* refuses far.example.*407") as caught:
            _fetch(f"{scheme}://far.example/blob", tmp_path / "blob")
        assert caught.value.reason == "PROXY_REFUSED"
        assert "secret" not in caught.value.message
        assert len(proxy.seen) == 1


def test_a_proxy_that_is_away_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_proxy() as proxy:
        _use(monkeypatch, proxy, user="somebody:secret@")
    with pytest.raises(Unavailable, match=f"through the proxy {proxy.address}") as caught:
        _fetch("http://far.example/blob", tmp_path / "blob")
    assert "secret" not in caught.value.message


def test_proxies_are_read_as_everybody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", "near.example")
    assert environment_proxy("https://far.example/") == "http://proxy.example:3128"
    assert environment_proxy("https://user@near.example/") is None
    proxy = parse_proxy("http://a:b%40c@proxy.example:3128")
    assert (str(proxy), proxy.authorization) == ("proxy.example:3128", f"Basic {base64.b64encode(b'a:b@c').decode()}")
    for wrong in ("socks5://proxy.example:1", "http://", "http://proxy.example:port"):
        with pytest.raises(InvalidRequest):
            parse_proxy(wrong)
