"""Who the registry is to an OCI registry: credentials, and the tokens that they are exchanged for.

Credentials are settings, or the logins that ``docker login`` left; a source or target never holds any. They are looked
for with the first request, and go to the registry that they are for, and to the token service that it names, over TLS
unless the registry itself has none.

Source: https://distribution.github.io/distribution/spec/auth/token/ and …/oauth/.
"""

import asyncio
import json
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from helios.registry.sources.docker_config import DOCKER_HUB, Credentials, find_credentials
from helios.registry.sources.reference import OciReference
from helios.registry.sources.settings import OciSettings
from helios.registry.sources.web import Answer, Refused, Web, origin, unavailable

_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_DOCKER_HUB_HOST: Final = "registry-1.docker.io"
# Registries' own default is a minute, and they may say nothing.
_TOKEN_SECONDS: Final = 60.0
_LOGIN_SECONDS: Final = 60.0
_MAX_SAID_CHARS: Final = 300


def base_url(host: str, repository: str, settings: OciSettings) -> str:
    """Returns where a repository is."""
    is_plain = host in settings.plain_http or (urlsplit(f"//{host}").hostname or "") in _LOOPBACK
    where = _DOCKER_HUB_HOST if host in DOCKER_HUB else host
    return f"{'http' if is_plain else 'https'}://{where}/v2/{repository}"


def said(error: Refused) -> str:
    """Returns what a registry says of its refusal, as far as it is fit to be shown; empty where it says nothing."""
    try:
        first = json.loads(error.body)["errors"][0]
        text = f"{first['code']}: {first['message']}"
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return error.message
    return text[:_MAX_SAID_CHARS] if text.isprintable() else error.message


class OciLogin:
    """The login to one repository; made anew for each pull and push. Belongs to the event loop."""

    def __init__(self, reference: OciReference, web: Web, settings: OciSettings, *, actions: str = "pull") -> None:
        """Asks for tokens that allow ``actions`` (``pull``, ``pull,push``) on the reference's repository."""
        self.credentials = Credentials()
        """The login; none before the first request."""
        self.base = base_url(reference.host, reference.repository, settings)
        """Where the repository is."""
        self._host = reference.host
        self._settings = settings
        self._is_known = False
        self._web = web
        self._scopes = [f"repository:{reference.repository}:{actions}"]
        self._challenge: dict[str, str] = {}
        self._authorization = ""
        self._renew_at = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._renewing = asyncio.Lock()

    def allow_pull(self, repositories: Iterable[str]) -> None:
        """Has tokens allow reading of other repositories, too, from which blobs may be mounted."""
        self._scopes += [f"repository:{name}:pull" for name in sorted(set(repositories))]

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Answer:
        """Makes a request as this login; a challenge is answered, and a token that has ended is replaced.

        Args:
            method: HTTP method.
            url: Absolute.
            headers: Beside the login's.
            **more: As ``Web.request`` takes it.

        Raises:
            Refused: Also after a login.
            Unavailable: SOURCE_UNAVAILABLE.
            PreconditionFailed: LOGIN_HELPER_FAILED.
        """
        self._loop = asyncio.get_running_loop()
        await self._know()
        await self.renew()
        shown, sent = self._authorization, dict(headers or {})
        if origin(url) != origin(self.base):
            # Uploads may have a place elsewhere, which its address alone opens.
            return await self._web.request(method, url, headers=sent, **more)
        try:
            return await self._web.request(method, url, headers=sent | self.headers(), **more)
        except Refused as error:
            if error.status != 401 or not error.headers.get("www-authenticate"):
                raise
            await self._answer(error.headers["www-authenticate"], shown)
        return await self._web.request(method, url, headers=sent | self.headers(), **more)

    async def renew(self) -> None:
        """Gets another token if this one ends soon."""
        if time.monotonic() < self._renew_at:
            return
        async with self._renewing:
            if time.monotonic() >= self._renew_at:
                await self._get_token()

    def headers(self) -> dict[str, str]:
        """Returns what shows the login."""
        return {"authorization": self._authorization} if self._authorization else {}

    def fresh_headers(self) -> Mapping[str, str]:
        """Returns the same with a token that is still good; for a transfer's threads."""
        if time.monotonic() >= self._renew_at and self._loop is not None:
            asyncio.run_coroutine_threadsafe(self.renew(), self._loop).result(_LOGIN_SECONDS)
        return self.headers()

    async def _know(self) -> None:
        async with self._renewing:
            if not self._is_known:
                self.credentials = await find_credentials(self._host, self._settings)
                self._is_known = True

    async def _answer(self, challenge: str, shown: str) -> None:
        async with self._renewing:
            if self._authorization != shown:
                # Another request has logged in meanwhile.
                return
            scheme, _, parameters = challenge.partition(" ")
            self._challenge = dict(_CHALLENGE.findall(parameters)) if scheme.lower() == "bearer" else {}
            self._authorization = self.credentials.basic
            if self._challenge.get("realm"):
                await self._get_token()

    async def _get_token(self) -> None:
        realm = self._challenge["realm"]
        # A realm without TLS would read the password on the way, unless the registry itself is spoken to like that.
        is_safe = urlsplit(realm).scheme == "https" or self.base.startswith("http:")
        try:
            answer = (await self._ask_token(realm, self.credentials if is_safe else Credentials())).document()
        except Refused as error:
            # Whatever its status: for the registry's caller it is a login that failed.
            raise Refused(Answer(401, error.headers, error.body, error.url)) from error
        token = (answer.get("token") or answer.get("access_token")) if isinstance(answer, dict) else None
        if not isinstance(token, str):
            raise unavailable(realm, "gives no token")
        seconds = answer.get("expires_in", _TOKEN_SECONDS)
        is_number = isinstance(seconds, int | float) and seconds > 0
        self._authorization = f"Bearer {token}"
        # Before it ends: a request takes its time.
        self._renew_at = time.monotonic() + 0.5 * (seconds if is_number else _TOKEN_SECONDS)

    async def _ask_token(self, realm: str, credentials: Credentials) -> Answer:
        service = [("service", self._challenge["service"])] if "service" in self._challenge else []
        if credentials.identity_token:
            form = [
                ("grant_type", "refresh_token"),
                ("client_id", "helios"),
                ("scope", " ".join(self._scopes)),
                ("refresh_token", credentials.identity_token),
            ]
            kind = {"content-type": "application/x-www-form-urlencoded"}
            body = urlencode([*form, *service]).encode()
            # A redirect would take the token along.
            return await self._web.request("POST", realm, headers=kind, body=body, is_following=False)
        query = urlencode([*(("scope", scope) for scope in self._scopes), *service])
        headers = {"authorization": credentials.basic} if credentials.basic else {}
        return await self._web.request("GET", f"{realm}{'&' if '?' in realm else '?'}{query}", headers=headers)
