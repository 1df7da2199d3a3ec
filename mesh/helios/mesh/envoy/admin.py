"""Envoy's administration interface, as far as the mesh uses it: ready, bound ports, statistics, drain."""

import asyncio
import time
from typing import Final, Self

import aiohttp

from helios.mesh.errors import Unavailable

PROMETHEUS_PATH: Final = "/stats/prometheus"
_POLL_SECONDS: Final = 0.02
_CALL_SECONDS: Final = 5.0


class EnvoyAdmin:
    """Talks to the interface at ``EdgeSettings.envoy_admin``; open it with ``async with``.

    It has no authentication: the unix socket's mode (0600) is what protects it.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Opens a client; connecting happens with the first call."""
        is_unix = self._address.startswith("unix:")
        connector = aiohttp.UnixConnector(self._address.removeprefix("unix:")) if is_unix else None
        base = "http://envoy" if is_unix else f"http://{self._address}"
        timeout = aiohttp.ClientTimeout(total=_CALL_SECONDS)
        self._session = aiohttp.ClientSession(base, connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the client."""
        if self._session is not None:
            await self._session.close()

    async def is_ready(self) -> bool:
        """Returns whether the listeners take connections; False also while Envoy is not there."""
        try:
            return (await self._call("GET", "/ready"))[0] == 200
        except Unavailable:
            return False

    async def wait_ready(self, deadline: float) -> None:
        """Returns when ready. ``deadline`` is absolute, ``time.monotonic()``. Raises Unavailable when it has passed."""
        while not await self.is_ready():
            if time.monotonic() >= deadline:
                raise Unavailable("Envoy is not ready; its log says why", metadata={"admin": self._address})
            await asyncio.sleep(_POLL_SECONDS)

    async def listeners(self) -> dict[str, str]:
        """Returns the bound address of each listener by name ("edge", "admin"): the port where the setting was 0."""
        _, text = await self._call("GET", "/listeners")
        return dict(line.split("::", 1) for line in text.splitlines() if "::" in line)

    async def prometheus(self) -> str:
        """Returns all statistics in Prometheus' text format."""
        return (await self._call("GET", PROMETHEUS_PATH))[1]

    async def drain(self) -> None:
        """Tells clients to go elsewhere (GOAWAY, Connection: close) and stops to listen once they had time to."""
        await self._call("POST", "/drain_listeners?graceful")

    async def _call(self, method: str, path: str) -> tuple[int, str]:
        assert self._session is not None, "the client is open"
        try:
            async with self._session.request(method, path) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable("Envoy's administration interface does not answer") from error
