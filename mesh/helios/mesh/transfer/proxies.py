"""The proxies of the environment: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, as curl and Python read them.

http.client knows none of them by itself. An https:// origin is reached through a tunnel (CONNECT), so the proxy sees
names and no bytes; an http:// one is asked for by its whole URL. The proxy itself is spoken to without TLS.
"""

import base64
import http.client
import re
import ssl
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from helios.mesh.errors import HeliosError, InvalidRequest
from helios.mesh.transfer.source import source_unavailable

_DEFAULT_PORT: Final = 80
_TUNNEL_STATUS: Final = re.compile(r"Tunnel connection failed: (\d{3})")
"""How http.client words a refused CONNECT; it has no field for it."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """What requests go through."""

    host: str
    port: int
    authorization: str
    """Of `Proxy-Authorization`; empty: none."""

    @property
    def headers(self) -> dict[str, str]:
        """What the proxy wants to know, and nobody else may."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}

    def __str__(self) -> str:
        """Without the password."""
        return f"{self.host}:{self.port}"


def environment_proxy(url: str) -> str | None:
    """Returns the URL of the proxy that the environment has for a URL; None where that is asked directly.

    For all that asks for URLs; not by a client's own reading of the environment, which may show the passwords of
    ~/.netrc to whatever host has an entry there (aiohttp's trust_env does), after a redirect too.
    """
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def parse_proxy(url: str) -> Proxy:
    """Reads a proxy's URL, `http://user:password@host:port`.

    Raises:
        InvalidRequest: INVALID_PROXY, where it is none that can be used.
    """
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if parts.scheme != "http" or not host:
        raise InvalidRequest(
            "the environment's proxy can't be used: it must be http://host:port",
            reason="INVALID_PROXY",
            metadata={"scheme": parts.scheme},
        )
    credentials = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        credentials = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return Proxy(host, port, credentials)


def open_connection(
    origin: SplitResult, proxy: Proxy | None, *, tls: ssl.SSLContext | None, timeout_seconds: float
) -> http.client.HTTPConnection:
    """Makes a connection to an origin, straight or through a proxy; it connects with its first request."""
    host = origin.hostname or ""
    at = (host, origin.port) if proxy is None else (proxy.host, proxy.port)
    if origin.scheme != "https":
        return http.client.HTTPConnection(*at, timeout=timeout_seconds)
    context = tls or ssl.create_default_context()
    connection = http.client.HTTPSConnection(*at, timeout=timeout_seconds, context=context)
    if proxy is not None:
        connection.set_tunnel(host, origin.port, headers=proxy.headers)
    return connection


def error_of_connection(error: Exception, origin: str, proxy: Proxy | None) -> HeliosError:
    """What it means that an origin can't be reached; a proxy that refuses is not asked again."""
    if proxy is None:
        return source_unavailable(f"{origin} can't be reached: {error}")
    status = _TUNNEL_STATUS.search(str(error))
    if status is not None and status[1].startswith("4"):
        return proxy_refusal(origin, proxy, int(status[1]))
    return source_unavailable(f"{origin} can't be reached through the proxy {proxy}: {error}")


def proxy_refusal(origin: str, proxy: Proxy, status: int) -> InvalidRequest:
    """The error of a proxy that does not let this through."""
    hint = "; HTTP_PROXY and HTTPS_PROXY may name user and password" if status == 407 else ""
    return InvalidRequest(
        f"the proxy {proxy} refuses {origin} ({status}){hint}",
        reason="PROXY_REFUSED",
        metadata={"status": str(status)},
    )
