"""Google Cloud Storage for tests: SeaweedFS behind a proxy that speaks Google's XML dialect.

Google's XML interface is S3's with other conditions and another way to say who asks; obstore and the registry use
nothing else of it. The packages that emulate Google take no uploads by it: fake-gcs-server answers 400, and
gcp-storage-emulator leaves out what obstore needs of an answer. So the bytes, listings, parts and conditions are a real
server's, and this translates: a bearer token, checked, to S3's signature; `x-goog-if-generation-match: 0` to
`If-None-Match: *`; slashes that are quoted in a key.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, unquote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.emulators.faulty_proxy import FaultyProxy
from tests.emulators.servers import Emulator

TOKEN: Final = "tests-token"


@dataclass
class GoogleProxy(FaultyProxy):
    """Translates; breaks what passes as its base does."""

    credentials: Credentials = field(default_factory=lambda: Credentials("", ""))

    @property
    def emulator(self) -> Emulator:
        """The store that it makes of the server."""
        options = {
            "google_base_url": f"http://{self.address}",
            "google_bearer_token": TOKEN,
            "google_allow_http": "true",
        }
        return Emulator(self.address, "gs", options)

    def translate(
        self, method: str, target: str, headers: Iterable[tuple[str, str]]
    ) -> tuple[str, Iterable[tuple[str, str]]]:
        """Returns the request as S3 takes it; one without the token as it is, which S3 refuses."""
        given = {name.lower(): value for name, value in headers}
        path, question, query = target.partition("?")
        # obstore quotes slashes and hyphens, which S3 signs as they are.
        target = quote(unquote(path)) + question + query
        if given.pop("authorization", "") != f"Bearer {TOKEN}":
            return target, [*given.items(), ("Authorization", "Bearer wrong")]
        if given.pop("x-goog-if-generation-match", "") == "0":
            given["if-none-match"] = "*"
        kept = {name: value for name, value in given.items() if not name.startswith("x-goog-")}
        kept["host"] = self.upstream
        signed = {name: kept[name] for name in ("host", "content-md5") if name in kept}
        request = AWSRequest(method, f"https://{self.upstream}{target}", headers=signed)
        _Signature(self.credentials, "s3", "us-east-1").add_auth(request)
        return target, (kept | {name.lower(): value for name, value in request.headers.items()}).items()


class _Signature(S3SigV4Auth):
    """S3's signature, but of the body, which a fault may change."""

    def payload(self, request: AWSRequest) -> str:
        del request
        return "UNSIGNED-PAYLOAD"


def google(server: Emulator) -> GoogleProxy:
    """Returns what makes an S3 server, with its buckets, one of Google's; a context manager."""
    credentials = Credentials(server.options["aws_access_key_id"], server.options["aws_secret_access_key"])
    return GoogleProxy(server.address, credentials=credentials)
