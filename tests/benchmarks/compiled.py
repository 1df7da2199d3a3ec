"""Programs in C that benchmarks measure with: a client and replicas that take microseconds where Python takes hundreds.

They are compiled when a benchmark starts; that needs a C compiler, and for the replicas OpenSSL's headers
(`apt-get install gcc libssl-dev`).
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).resolve().parent / "native"
_LIBRARIES: Final = {"worker": ("-lssl", "-lcrypto"), "load": ("-lm",)}
_COMPILE_SECONDS: Final = 60.0
# Beyond what a load itself may take: its answers are waited for, for as long as load.c says.
_GRACE_SECONDS: Final = 60.0


def build(name: str, directory: Path) -> Path:
    """Compiles a program into a directory. Raises RuntimeError with the compiler's words, or where there is none."""
    program = directory / name
    command = ["cc", "-O2", "-o", str(program), str(SOURCES / f"{name}.c"), *_LIBRARIES[name]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("there is no C compiler: apt-get install gcc libssl-dev") from error
    if done.returncode:
        raise RuntimeError(f"{name}.c does not compile (it needs gcc and libssl-dev):\n{done.stderr}")
    return program


@dataclass(frozen=True, slots=True)
class Served:
    """What a load came to; latencies in milliseconds."""

    completed: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """Requests a second."""
        return self.completed / self.seconds


class LoadClient:
    """Sends requests, which are all of one length, to ports of this machine."""

    def __init__(self, program: Path, requests: Sequence[bytes]) -> None:
        """``program`` is what ``build("load", …)`` made; ``requests`` are sent in turns."""
        assert len({len(request) for request in requests}) == 1, "requests differ in length"
        self._program = program
        self._requests = requests

    def paced(self, port: int, *, connections: int, per_second: float, count: int) -> Served:
        """Sends ``count`` requests at fixed times, whether or not answers have come."""
        return self._run(port, connections, per_second, count)

    def saturating(self, port: int, *, connections: int, seconds: float) -> Served:
        """Sends the next request on each connection as soon as it has its answer."""
        return self._run(port, connections, 0, seconds)

    def _run(self, port: int, connections: int, per_second: float, amount: float) -> Served:
        arguments = (port, connections, len(self._requests[0]), per_second, amount)
        done = subprocess.run(
            [str(self._program), *map(str, arguments)],
            input=b"".join(self._requests),
            capture_output=True,
            timeout=_GRACE_SECONDS + (amount / per_second if per_second else amount),
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the load failed: {done.stderr.decode(errors='replace')[-1000:]}")
        found = json.loads(done.stdout)
        if found["failed"] or not found["completed"]:
            words = done.stderr.decode(errors="replace")[:1000]
            raise RuntimeError(f"{found['failed']} requests were refused: {words}")
        return Served(found["completed"], found["seconds"], found["p50_us"] / 1e3, found["p99_us"] / 1e3)
