"""Whose login an OCI registry gets: the settings', or what ``docker login`` left.

Docker keeps logins in its file (``auths``), or in the care of programs that the file names: ``credHelpers`` for some
hosts, ``credsStore`` for all others (a keychain, or a cloud's short-lived tokens). A program is asked by
``docker-credential-<name> get``: the host on its standard input, JSON on its output. It is the operator's own, named in
the operator's own file, and still gets no more than it needs: a deadline, a bounded answer, an environment without this
registry's settings.

Source: https://github.com/docker/docker-credential-helpers, https://docs.docker.com/reference/cli/docker/login/.
"""

import asyncio
import base64
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from helios.mesh.errors import PreconditionFailed
from helios.registry import offload
from helios.registry.sources.conversion import end_process
from helios.registry.sources.settings import OciSettings

log = structlog.get_logger()

# Docker Hub has a name, another host, and a third one in Docker's own file.
DOCKER_HUB: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_DOCKER_HUB_KEY: Final = "https://index.docker.io/v1/"
_MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_ANSWER_BYTES: Final = 64 << 10
"""Tokens of clouds have some kilobytes."""
_MAX_SAID_CHARS: Final = 200
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NOT_FOUND: Final = "credentials not found in native keychain"
"""What every helper says of a host that it does not know; the protocol has no other way."""
_IDENTITY: Final = "<token>"
"""The user's name where the secret is an identity token."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A login. ``basic`` is a header's value; ``identity_token`` is exchanged for tokens. Both empty: anybody."""

    basic: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        """Whether there is a login."""
        return bool(self.basic or self.identity_token)


async def find_credentials(host: str, settings: OciSettings) -> Credentials:
    """Returns the login for a host: that of the settings, else of the helper that Docker's file names for it, else the
    file's own.

    Raises:
        PreconditionFailed: LOGIN_HELPER_FAILED, it can't be asked, or gives no sense.
    """
    if (found := settings.credentials.get(host)) is not None:
        return Credentials(_basic(found.get_secret_value()))
    config = await offload.run(lambda _: _read(settings))
    name = _table(config, "credHelpers").get(host) or config.get("credsStore")
    if isinstance(name, str) and name and settings.helper_seconds:
        server = _DOCKER_HUB_KEY if host in DOCKER_HUB else host
        if asked := await _ask(name, server, settings):
            return asked
    return _kept(host, _table(config, "auths"))


def _kept(host: str, logins: Mapping[str, Any]) -> Credentials:
    names = (host, f"https://{host}", *((_DOCKER_HUB_KEY,) if host in DOCKER_HUB else ()))
    login: dict[str, Any] = next((logins[name] for name in names if isinstance(logins.get(name), dict)), {})
    if isinstance(token := login.get("identitytoken"), str) and token:
        return Credentials(identity_token=token)
    auth = login.get("auth")
    if isinstance(auth, str) and auth and auth.isascii() and auth.isprintable():
        return Credentials(f"Basic {auth}")
    return Credentials()


async def _ask(name: str, server: str, settings: OciSettings) -> Credentials:
    environment = {key: value.get_secret_value() for key, value in settings.helper_environment.items()}
    program = f"docker-credential-{name}"
    place = shutil.which(program, path=environment.get("PATH", "")) if _HELPER.fullmatch(name) else None
    if place is None:
        raise _failed(program, "is named in Docker's file and not to be found")
    try:
        async with asyncio.timeout(settings.helper_seconds):
            status, output = await _run([place, "get"], server.encode(), environment)
    except TimeoutError as error:
        raise _failed(program, f"did not answer within {settings.helper_seconds:g} s") from error
    except OSError as error:
        raise _failed(program, f"can't be started: {error.strerror}") from error
    if len(output) > _MAX_ANSWER_BYTES:
        raise _failed(program, f"answered with more than {_MAX_ANSWER_BYTES >> 10} KiB")
    if status:
        said = output.decode("utf-8", "replace").strip()
        if said == _NOT_FOUND:
            return Credentials()
        shown = said[:_MAX_SAID_CHARS] if said.isprintable() else ""
        raise _failed(program, f"failed with status {status}{': ' + shown if shown else ''}")
    match _parse(output):
        case {"Username": str(user), "Secret": str(secret)} if secret:
            log.info("login from a helper", helper=program, server=server)
            return Credentials(identity_token=secret) if user == _IDENTITY else Credentials(_basic(f"{user}:{secret}"))
    # Not what it answered: there may be a secret in it.
    raise _failed(program, "answered with something that is no login")


async def _run(command: list[str], request: bytes, environment: Mapping[str, str]) -> tuple[int, bytes]:
    """Returns the status and the output, which is one byte longer than allowed where it is longer."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Helpers say there what is for people, and may say secrets.
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request)
        process.stdin.close()
        output = bytearray()
        while len(output) <= _MAX_ANSWER_BYTES:
            piece = await process.stdout.read(_MAX_ANSWER_BYTES + 1 - len(output))
            if not piece:
                return await process.wait(), bytes(output)
            output += piece
        return 0, bytes(output)
    finally:
        await end_process(process)


def _read(settings: OciSettings) -> dict[str, Any]:
    """Returns Docker's file; nothing where it is missing or is no such file."""
    if settings.docker_config is None:
        return {}
    try:
        with settings.docker_config.expanduser().open("rb") as file:
            document = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RuntimeError, RecursionError):
        # RuntimeError: there is no home directory.
        return {}
    return document if isinstance(document, dict) else {}


def _table(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = document.get(name)
    return found if isinstance(found, dict) else {}


def _parse(output: bytes) -> Any:
    try:
        return json.loads(output)
    except (ValueError, RecursionError):
        return None


def _basic(credentials: str) -> str:
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"


def _failed(program: str, why: str) -> PreconditionFailed:
    return PreconditionFailed(
        f"{program} {why}; log in again, or give the registry a login by HELIOS_REGISTRY__SOURCES__OCI__CREDENTIALS",
        reason="LOGIN_HELPER_FAILED",
        metadata={"helper": program},
    )
