"""Logins that Docker keeps: in its file, or with programs that it names, which are real programs here."""

import asyncio
import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr

from helios.mesh.errors import PreconditionFailed
from helios.registry.sources.docker_config import Credentials, find_credentials
from helios.registry.sources.settings import OciSettings, SourceSettings

WAIT_SECONDS = 30.0
BASIC = Credentials("Basic " + base64.b64encode(b"user:secret").decode())
ANSWER = json.dumps({"ServerURL": "any", "Username": "user", "Secret": "secret"})


class Docker:
    """A machine with Docker's file and helpers on its path."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.programs = directory / "bin"
        self.programs.mkdir()
        self.asked = directory / "asked"

    def helper(self, name: str, code: str) -> None:
        """Makes a helper: Python, which finds what it was asked for in ``server``."""
        program = self.programs / f"docker-credential-{name}"
        program.write_text(
            f"#!{sys.executable} -S\nimport os, sys, time\nassert sys.argv[1:] == ['get']\n"
            f"server = sys.stdin.read()\nopen({str(self.asked)!r}, 'a').write(server + '\\n')\n{code}\n"
        )
        program.chmod(0o755)

    async def find(self, host: str, *, seconds: float = 30.0, **config: Any) -> Credentials:
        """Asks for the login of a host."""
        file = self.directory / "config.json"
        file.write_text(json.dumps(config))
        environment = {"PATH": SecretStr(f"{self.programs}:{os.defpath}")}
        settings = OciSettings(docker_config=file, helper_seconds=seconds, helper_environment=environment)
        return await find_credentials(host, settings)


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    return Docker(tmp_path)


async def test_the_helper_of_a_host_goes_before_the_one_for_all_others(docker: Docker) -> None:
    docker.helper("cloud", f"print({ANSWER!r})")
    docker.helper("keychain", 'print(\'{"Username": "<token>", "Secret": "refresh"}\')')
    config: dict[str, Any] = {"credsStore": "keychain", "credHelpers": {"cloud.example:5000": "cloud"}}
    assert await docker.find("cloud.example:5000", **config) == BASIC
    assert await docker.find("other.example", **config) == Credentials(identity_token="refresh")
    assert await docker.find("docker.io", **config) == Credentials(identity_token="refresh")
    assert docker.asked.read_text().splitlines() == [
        "cloud.example:5000",
        "other.example",
        "https://index.docker.io/v1/",
    ]


async def test_a_host_that_a_helper_does_not_know_is_looked_for_in_the_file(docker: Docker) -> None:
    docker.helper("keychain", "print('credentials not found in native keychain'); sys.exit(1)")
    auth = base64.b64encode(b"user:secret").decode()
    assert await docker.find("a.example", credsStore="keychain", auths={"a.example": {"auth": auth}}) == BASIC
    assert await docker.find("b.example", credsStore="keychain", auths={"b.example": {}}) == Credentials()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('the keychain is locked'); sys.exit(1)", "status 1: the keychain is locked"),
        ("print('\\x1b[2J'); sys.exit(3)", "status 3;"),
        ("print('no JSON')", "no login"),
        ("print('[]')", "no login"),
        ('print(\'{"Username": "user", "Secret": ""}\')', "no login"),
        ("os.write(1, b'x' * 100_000)", "more than 64 KiB"),
        ("os.kill(os.getpid(), 9)", "status -9"),
    ],
)
async def test_a_helper_that_makes_no_sense_is_an_error_that_says_so(docker: Docker, code: str, said: str) -> None:
    docker.helper("broken", code)
    with pytest.raises(PreconditionFailed) as failed:
        await docker.find("a.example", credsStore="broken")
    assert failed.value.reason == "LOGIN_HELPER_FAILED"
    assert "docker-credential-broken " in failed.value.message
    assert said in failed.value.message


@pytest.mark.parametrize("name", ["missing", "../../bin/sh", "a b", "-x"])
async def test_a_helper_that_is_not_to_be_found_is_an_error_that_says_so(docker: Docker, name: str) -> None:
    with pytest.raises(PreconditionFailed, match="not to be found"):
        await docker.find("a.example", credsStore=name)


async def test_a_helper_that_hangs_is_ended(docker: Docker) -> None:
    docker.helper("slow", "time.sleep(600)")
    with pytest.raises(PreconditionFailed, match=r"did not answer within 0.2 s"):
        await docker.find("a.example", seconds=0.2, credsStore="slow")


async def test_a_caller_who_leaves_ends_a_helper_with_all_that_it_started(docker: Docker) -> None:
    note = docker.directory / "pids"
    docker.helper("slow", f"os.fork()\nopen({str(note)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(600)")
    async with asyncio.timeout(WAIT_SECONDS), asyncio.TaskGroup() as group:
        finding = group.create_task(docker.find("a.example", seconds=600.0, credsStore="slow"))
        while not note.exists() or len(note.read_text().split()) < 2:
            await asyncio.sleep(0.01)
        finding.cancel()
    async with asyncio.timeout(WAIT_SECONDS):
        while any(map(_lives, note.read_text().split())):
            await asyncio.sleep(0.01)


def _lives(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_a_helper_sees_nothing_of_the_registrys_own_settings(docker: Docker) -> None:
    docker.helper("env", "import json; print(json.dumps({'Username': 'user', 'Secret': repr(dict(os.environ))}))")
    theirs = {"PATH": f"{docker.programs}:{os.defpath}", "AWS_PROFILE": "models"}
    own = {"HELIOS_REGISTRY__DATABASE_URL": "postgresql://x:password@h/d", "PGPASSWORD": "password", "HF_TOKEN": "hf"}
    file = docker.directory / "config.json"
    file.write_text(json.dumps({"credsStore": "env"}))
    settings = SourceSettings(oci=OciSettings(docker_config=file)).with_environment(theirs | own)
    found = base64.b64decode((await find_credentials("a.example", settings.oci)).basic.removeprefix("Basic ")).decode()
    assert "AWS_PROFILE" in found
    assert not any(name in found for name in own)
    assert "password" not in repr(settings)


async def test_settings_and_hosts_without_helpers_start_nothing(docker: Docker) -> None:
    docker.helper("keychain", f"print({ANSWER!r})")
    assert await docker.find("a.example", seconds=0.0, credsStore="keychain") == Credentials()
    assert await docker.find("a.example", credHelpers={"b.example": "keychain"}) == Credentials()
    settings = OciSettings(credentials={"a.example": SecretStr("user:secret")}, docker_config=None)
    assert await find_credentials("a.example", settings) == BASIC
    assert not docker.asked.exists()
