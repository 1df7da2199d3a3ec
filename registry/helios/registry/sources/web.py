"""Metadata and small files over HTTP: what is asked for before the bytes of a model are fetched.

aiohttp over the hubs' own clients: those block, have no deadline and can't be cancelled, and an ingest must stop when
its caller leaves. Bulk bytes don't go through here.

A request that failed for want of a working server (429, 5xx, a broken connection) is made again after the time that the
server names, or full jitter; a refusal is raised as ``Refused``, which each hub puts into words that say what to do.
Credentials stay with the origin they are for: a redirect to another one is followed without them.
"""

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import IO, Any, Final, Self
from urllib.parse import urljoin, urlsplit

import aiohttp

from helios.mesh.errors import Unavailable
from helios.mesh.transfer.proxies import environment_proxy
from helios.registry.strict_json import malformed

# Hubs answer in well under a second; a page of a thousand files takes one. A wait for bytes, not for all of them.
_WAIT_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 10.0
# Some 8 MiB at 14 kB/s: whoever is slower only drips.
_REQUEST_SECONDS: Final = 600.0
_SLOWEST_BYTES_PER_SECOND: Final = 14_000
_ATTEMPTS: Final = 6
_SHORT_ATTEMPTS: Final = 3
_BACKOFF_SECONDS: Final = 0.25
_BACKOFF_CAP_SECONDS: Final = 8.0
# A server that names more than this is reported rather than waited for.
MAX_RETRY_AFTER_SECONDS: Final = 60.0
_MAX_REDIRECTS: Final = 5
# A page of the largest repositories has some hundred kilobytes.
MAX_DOCUMENT_BYTES: Final = 32 << 20
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
# A file is opened for each attempt, and closed by it.
Body = bytes | Callable[[], IO[bytes]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    def document(self) -> Any:
        """Returns the body's JSON. Raises Unavailable: it is no JSON, so this is not the service that was meant."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise unavailable(self.url, "answered with something that is not JSON") from error


class Refused(Exception):
    """The server said no, and would say so again: a status of 4xx other than 408 and 429."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status} for {shown(answer.url)}")
        self.status = answer.status
        self.headers = answer.headers
        self.body = answer.body
        self.url = answer.url

    @property
    def code(self) -> str:
        """The hub's own name of the error; empty where it gives none."""
        return self.headers.get("x-error-code", "")

    @property
    def message(self) -> str:
        """The server's words, as far as they are fit to be shown."""
        text = self.headers.get("x-error-message", "")
        return text[:300] if text.isprintable() else ""


class Web:
    """One HTTP session. An async context manager."""

    def __init__(self, *, attempts: int = _ATTEMPTS, wait_seconds: float = _WAIT_SECONDS) -> None:
        self._attempts = attempts
        self._wait_seconds = wait_seconds
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Opens the session."""
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            headers={"accept-encoding": "identity", "user-agent": "helios-registry"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=self._wait_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes it."""
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        limit_bytes: int = MAX_DOCUMENT_BYTES,
        is_cut: bool = False,
        is_following: bool = True,
        body: Body | None = None,
        attempts: int | None = None,
    ) -> Answer:
        """Makes an idempotent request until it is answered.

        Args:
            method: HTTP method.
            url: Absolute.
            headers: Sent to the origin of ``url`` only, as far as they are credentials.
            limit_bytes: A larger body is refused.
            is_cut: A larger body is read this far, and no error.
            is_following: Redirects are followed; else they are an answer.
            body: What is sent.
            attempts: How often it is made at most; None: the session's own number.

        Raises:
            Refused: A status of 4xx.
            Unavailable: SOURCE_UNAVAILABLE, there was no answer, or none but failures.
            InvalidRequest: UNSUPPORTED_FORMAT, the body is too large.
        """
        attempt = 0
        while True:
            attempt += 1
            retry_after: float | None = None
            try:
                limit = _Limit(limit_bytes, is_cut=is_cut)
                async with asyncio.timeout(_longest(headers or {})):
                    answer = await self._once(method, url, headers or {}, limit, is_following=is_following, body=body)
                if answer.status < 400:
                    return answer
                if answer.status < 500 and answer.status not in {408, 429}:
                    raise Refused(answer)
                retry_after = read_retry_after(answer.headers)
                detail = f"answered {answer.status}"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                detail = str(error) or type(error).__name__
            if attempt >= (attempts or self._attempts) or (retry_after or 0) > MAX_RETRY_AFTER_SECONDS:
                raise unavailable(url, detail, retry_after)
            await asyncio.sleep(retry_after if retry_after is not None else jitter(attempt))

    async def read(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        offset: int,
        length: int,
        is_whole: bool,
        check: Callable[[str], None] | None = None,
    ) -> bytes:
        """Returns bytes of a file; another number of them where it has another length than the caller thinks.

        A server that can't send parts is read from the beginning, so this is for small files and what files begin with.
        ``check`` is asked whether the answer's ETag, empty where it is weak or none, will do, and raises if not.

        Raises:
            Refused, Unavailable: As ``request``.
        """
        if length == 0:
            return b""
        end = offset + length
        # Not where the whole is wanted: servers that compute what they send may refuse parts of it.
        sent = dict(headers or {}) | ({} if is_whole else {"range": f"bytes={offset}-{end - 1}"})
        content = b""
        for _ in range(_SHORT_ATTEMPTS):
            # One more, so that a file that has grown is not taken for the whole.
            answer = await self.request("GET", url, headers=sent, limit_bytes=end + is_whole, is_cut=True)
            if check is not None:
                etag = answer.headers.get("etag", "")
                check("" if etag.startswith("W/") else etag)
            content = answer.body if answer.status == 206 else answer.body[offset : end + is_whole]
            # A proxy on the way may have cut it.
            if len(content) == length:
                break
        return content

    async def _once(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        limit: "_Limit",
        *,
        is_following: bool,
        body: Body | None,
    ) -> Answer:
        assert self._session is not None, "the session is open"
        sent = dict(headers)
        for _ in range(_MAX_REDIRECTS + 1):
            async with self._session.request(
                method,
                url,
                headers=sent,
                data=body() if callable(body) else body,
                allow_redirects=False,
                proxy=environment_proxy(url),
            ) as response:
                # Those of the registries may come with several of a name; none that is read here does.
                found = {name.lower(): value for name, value in response.headers.items()}
                if is_following and response.status in _REDIRECTS and "location" in found:
                    target = redirected(url, found["location"])
                    if origin(target) != origin(url):
                        sent = without_credentials(sent)
                    url = target
                    continue
                content = await _read(response, limit)
                return Answer(response.status, found, content, url)
        raise unavailable(url, "redirects again and again")


@dataclass(frozen=True, slots=True)
class _Limit:
    size_bytes: int
    is_cut: bool


async def _read(response: aiohttp.ClientResponse, limit: _Limit) -> bytes:
    content = bytearray()
    async for part in response.content.iter_any():
        content += part
        if len(content) > limit.size_bytes:
            # The rest of an error's page is of no interest either.
            if limit.is_cut or response.status >= 400:
                return bytes(content[: limit.size_bytes])
            raise malformed(f"{shown(str(response.url))} answers with more than {limit.size_bytes} bytes")
    return bytes(content)


def _longest(headers: Mapping[str, str]) -> float:
    """Returns how long an attempt may take, in seconds; one that sends a large file may take longer."""
    return max(_REQUEST_SECONDS, int(headers.get("content-length", "0")) / _SLOWEST_BYTES_PER_SECOND)


def origin(url: str) -> tuple[str, str, int | None]:
    """Returns scheme, host and port: what credentials are bound to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def redirected(url: str, location: str) -> str:
    """Returns where a redirect leads. Raises Unavailable where it leaves HTTP, or gives up its encryption."""
    target = urljoin(url, location)
    before, after = urlsplit(url).scheme, urlsplit(target).scheme
    if after not in {"http", "https"} or (before == "https" and after == "http"):
        raise unavailable(url, f"redirects to {after or 'no'}:, which is not followed")
    return target


def without_credentials(headers: Mapping[str, str]) -> dict[str, str]:
    """Returns headers as they may go to another origin."""
    return {name: value for name, value in headers.items() if name.lower() not in {"authorization", "cookie"}}


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that a Retry-After header names, as a number or a date; None without a readable one."""
    text = headers.get("retry-after", "")
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def jitter(attempt: int) -> float:
    """Returns how long to wait after the n-th failure: full jitter, so that many who failed at once don't return so."""
    return random.uniform(0, min(_BACKOFF_CAP_SECONDS, _BACKOFF_SECONDS * 2**attempt))  # noqa: S311 - no secret


def shown(url: str) -> str:
    """Returns a URL without its query, which may be a signature."""
    return url.partition("?")[0]


def unavailable(url: str, detail: str, retry_after: float | None = None) -> Unavailable:
    """Returns the error of a place that does not work now."""
    return Unavailable(
        f"{shown(url)} {detail}; check the address and the network, then try again: what was fetched is kept",
        reason="SOURCE_UNAVAILABLE",
        retry_after_seconds=retry_after,
        metadata={"url": shown(url)},
    )
