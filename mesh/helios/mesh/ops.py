"""The operators' HTTP address of a process: ``/metrics`` (Prometheus), ``/healthz`` (it runs), ``/readyz`` (it serves).

Plain HTTP, loopback by default, no secrets. aiohttp is used rather than prometheus_client's own server, which needs a
thread and can't say readiness.
"""

from collections.abc import Callable
from typing import Self

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from helios.mesh.errors import InvalidRequest


class OpsServer:
    """Serves the three paths while it is open; ``address`` is ``host:port`` once entered."""

    def __init__(self, listen: str, *, is_ready: Callable[[], bool], registry: CollectorRegistry = REGISTRY) -> None:
        self._listen = listen
        self._is_ready = is_ready
        self._registry = registry
        self._runner: web.AppRunner | None = None
        self.address = ""

    async def __aenter__(self) -> Self:
        """Binds and serves. Raises InvalidRequest where the address is taken."""
        application = web.Application()
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        host, _, port = self._listen.rpartition(":")
        try:
            await web.TCPSite(self._runner, host, int(port)).start()
        except OSError as error:
            await self._runner.cleanup()
            raise InvalidRequest(f"can't listen on {self._listen} (ops_listen): {error.strerror}") from error
        self.address = f"{host}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the address."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        is_ready = self._is_ready()
        return web.Response(text="ready\n" if is_ready else "not ready\n", status=200 if is_ready else 503)
