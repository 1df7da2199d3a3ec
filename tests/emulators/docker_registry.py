"""Debian's docker-registry on loopback: the reference implementation of OCI's registry, run without root or Docker.

``make debian`` unpacks its package below ``build/debian``. Models are pushed here by the protocol itself, in as few
lines as it takes, so that what a pull reads was not written by the code under test.
"""

import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import aiohttp

from tests.emulators.servers import _running, _wait_http
from tests.ports import free_port

BINARY: Final = Path(__file__).parents[2] / "build" / "debian" / "usr" / "bin" / "docker-registry"
_CONFIGURATION: Final = """\
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {directory}/blobs}}}}
http: {{addr: {address}}}
"""


@contextmanager
def docker_registry() -> Iterator[str]:
    """Runs a registry on an empty directory; yields its ``host:port``."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="helios-registry-")))
        address = f"127.0.0.1:{free_port()}"
        configuration = directory / "config.yml"
        configuration.write_text(_CONFIGURATION.format(directory=directory, address=address))
        process = stack.enter_context(_running([str(BINARY), "serve", str(configuration)], directory))
        _wait_http(process, address, directory)
        yield address


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
            put = self._session.put(f"{location}&digest={digest}", data=content)
            async with put as stored:
                assert stored.status == 201, await stored.text()
        headers = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
        async with self._session.put(f"{self._base}/manifests/{tag}", data=manifest, headers=headers) as named:
            assert named.status == 201, await named.text()
            return named.headers["Docker-Content-Digest"]
