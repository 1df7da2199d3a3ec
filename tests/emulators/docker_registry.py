"""Debian's docker-registry on loopback: the reference implementation of OCI's registry, run without root or Docker.

``make debian`` unpacks its package below ``build/debian``. Models are pushed here by the protocol itself, in as few
lines as it takes, so that what a pull reads was not written by the code under test. It may want a login: a password,
or tokens, which ``TokenService`` hands out.
"""

import base64
import hashlib
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Self
from urllib.parse import parse_qs, urlsplit

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.emulators.servers import _running, _wait_http
from tests.ports import free_port

BINARY: Final = Path(__file__).parents[2] / "build" / "debian" / "usr" / "bin" / "docker-registry"
_CONFIGURATION: Final = """\
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {directory}/blobs}}}}
http: {{addr: {address}, secret: here}}
"""
# A vector of crypt_blowfish's own tests: bcrypt of "U*U".
PASSWORD: Final = "U*U"
_HTPASSWD: Final = "user:$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\n"
_SERVICE: Final = "docker-registry"


@contextmanager
def docker_registry(*, has_password: bool = False, tokens: "TokenService | None" = None) -> Iterator[str]:
    """Runs a registry on an empty directory; yields its ``host:port``.

    Args:
        has_password: Only ``user`` with ``PASSWORD`` may read and write.
        tokens: Only who has a token of this service may.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="helios-registry-")))
        address = f"127.0.0.1:{free_port()}"
        configuration = directory / "config.yml"
        text = _CONFIGURATION.format(directory=directory, address=address)
        if has_password:
            (directory / "htpasswd").write_text(_HTPASSWD)
            text += f"auth: {{htpasswd: {{realm: here, path: {directory}/htpasswd}}}}\n"
        if tokens is not None:
            (directory / "issuer.pem").write_bytes(tokens.certificate.public_bytes(serialization.Encoding.PEM))
            text += (
                f"auth: {{token: {{realm: '{tokens.realm}', service: {_SERVICE}, issuer: tests,"
                f" rootcertbundle: {directory}/issuer.pem}}}}\n"
            )
        configuration.write_text(text)
        process = stack.enter_context(_running([str(BINARY), "serve", str(configuration)], directory))
        _wait_http(process, address, directory)
        yield address


@dataclass
class TokenService:
    """Hands out tokens of Docker's flow, to ``user`` with ``PASSWORD`` or with ``identity_token``. A context manager.

    Attributes:
        seconds: How long a token is good for.
        handed_out: The scopes of each token.
    """

    seconds: int = 300
    identity_token: str = "a-refresh-token"
    handed_out: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="tokens"
        )

    @property
    def realm(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def token(self, scopes: list[str]) -> dict[str, object]:
        """Returns a token for scopes, signed, with the certificate of its key."""
        self.handed_out.append(scopes)
        now = int(datetime.now(UTC).timestamp())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        claims = {"iss": "tests", "sub": "user", "aud": _SERVICE, "nbf": now - 60, "iat": now, "jti": str(now)}
        claims |= {"exp": now + self.seconds, "access": access}
        chain = [base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode()]
        signed = f"{_encoded({'typ': 'JWT', 'alg': 'RS256', 'x5c': chain})}.{_encoded(claims)}"
        signature = self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return {"token": f"{signed}.{_base64url(signature)}", "expires_in": self.seconds}


def _handler(service: TokenService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            basic = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
            query = parse_qs(urlsplit(self.path).query)
            self._answer(query.get("scope", []), is_known=self.headers.get("Authorization") == f"Basic {basic}")

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            is_known = form["grant_type"] == ["refresh_token"] and form["refresh_token"] == [service.identity_token]
            self._answer(form["scope"][0].split(" "), is_known=is_known)

        def _answer(self, scopes: list[str], *, is_known: bool) -> None:
            body = json.dumps(service.token(scopes) if is_known else {"details": "incorrect username or password"})
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            """Says nothing."""

    return Handler


def _encoded(document: Mapping[str, object]) -> str:
    return _base64url(json.dumps(document).encode())


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@asynccontextmanager
async def pusher(address: str, repository: str) -> AsyncIterator["Pusher"]:
    """Yields what pushes to a repository."""
    async with aiohttp.ClientSession() as session:
        yield Pusher(session, f"http://{address}/v2/{repository}")


class Pusher:
    """Pushes blobs and manifests."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self._session = session
        self._base = base

    async def push(self, tag: str, blobs: Mapping[str, bytes], manifest: bytes) -> str:
        """Pushes files and the manifest that names them; returns the digest that the registry gives it."""
        for content in [*blobs.values(), b"{}"]:
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            async with self._session.post(f"{self._base}/blobs/uploads/") as begun:
                assert begun.status == 202, await begun.text()
                location = begun.headers["Location"]
            put = self._session.put(f"{location}&digest={digest}", data=io.BytesIO(content))
            async with put as stored:
                assert stored.status == 201, await stored.text()
        headers = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
        async with self._session.put(f"{self._base}/manifests/{tag}", data=manifest, headers=headers) as named:
            assert named.status == 201, await named.text()
            return named.headers["Docker-Content-Digest"]
