"""The state directory of a mesh on one machine: where everything is, who runs it, how to find it.

``run/mesh.json`` says what runs where; it is replaced atomically whenever that changes, and every command finds the
mesh by it. ``run/lock`` is held (flock) by the process that runs the mesh, so that a crash can't leave a stale lock
behind.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from helios.mesh.errors import AlreadyExists, PreconditionFailed

# sun_path holds 108 bytes with its end.
_SOCKET_PATH_LIMIT: Final = 107
_LONGEST_SOCKET_NAME: Final = "envoy-admin.sock"
# Everybody may write here, so that a name may be somebody else's.
_SHARED: Final = Path(tempfile.gettempdir())

# What a start that was cut short may have left; lost+found is there where a file system is mounted for the mesh.
_OWN_NAMES: Final = frozenset(
    {"admin-token", "envoy", "logs", "lost+found", "pki", "proxy", "registry", "run", "storage", "worker"}
)


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """Paths of one mesh."""

    root: Path

    @property
    def pki(self) -> Path:
        """The CA and one leaf directory for each component."""
        return self.root / "pki"

    @property
    def run(self) -> Path:
        """What lives as long as the mesh runs: lock, mesh.json, ready files."""
        return self.root / "run"

    @property
    def sockets(self) -> Path:
        """Unix sockets: ``run``, or a private directory of the system's where the path would be too long for a
        socket.
        """
        if len(str(self.run / _LONGEST_SOCKET_NAME).encode()) <= _SOCKET_PATH_LIMIT:
            return self.run
        name = hashlib.sha256(str(self.root).encode()).hexdigest()[:16]
        return _SHARED / f"helios-{os.getuid()}-{name}"

    @property
    def logs(self) -> Path:
        """One log file for each process."""
        return self.root / "logs"

    @property
    def admin_token_file(self) -> Path:
        """The token of the admin address, mode 0600."""
        return self.root / "admin-token"

    @property
    def mesh_file(self) -> Path:
        """What runs where."""
        return self.run / "mesh.json"

    def create(self) -> None:
        """Makes the directories, readable by their owner only. Raises PreconditionFailed where that is not possible."""
        self._require_no_strangers()
        for directory in (self.root, self.pki, self.run, self.logs, self.sockets):
            try:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                if directory.parent == _SHARED:
                    _require_own(directory)
                directory.chmod(0o700)
            except OSError as error:
                raise PreconditionFailed(
                    f"can't use {directory} ({error.strerror}); choose another place with --state-dir"
                ) from error

    def _require_no_strangers(self) -> None:
        """Raises PreconditionFailed where the directory is something else's: making it ours would lock others out.

        ``--state-dir "$UNSET"`` is the current directory, and that may be a home or /tmp.
        """
        if (self.run / "lock").exists() or not self.root.is_dir():
            return
        try:
            names = {entry.name for entry in self.root.iterdir()}
            strangers = sorted(name for name in names - _OWN_NAMES if not name.startswith("proxy-"))
        except OSError as error:
            raise PreconditionFailed(
                f"can't read {self.root} ({error.strerror}); choose another place with --state-dir"
            ) from error
        if strangers:
            raise PreconditionFailed(
                f"{self.root} is no state directory: {strangers[0]} is not the mesh's. Name a new or an empty one with "
                "--state-dir",
                reason="NOT_A_STATE_DIRECTORY",
            )

    def component(self, name: str) -> Path:
        """Returns the directory that a component keeps its own state in."""
        directory = self.root / name
        directory.mkdir(exist_ok=True, mode=0o700)
        return directory

    def admin_token(self) -> str:
        """Returns the admin token; makes it on first use. Raises PreconditionFailed where others may know it."""
        path = self.admin_token_file
        if not path.exists():
            _write_once(path, secrets.token_urlsafe(32))
        with path.open() as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            token = file.read().strip()
        if mode & 0o077 or not token:
            raise PreconditionFailed(
                f"{path} {f'can be read by others (mode {mode:o})' if token else 'is empty'}; remove it, then "
                "`helios down` and `helios up`: the mesh makes a new token",
                reason="ADMIN_TOKEN_UNSAFE",
            )
        return token

    def lock(self) -> "Lock":
        """Returns the lock of the mesh, not taken yet."""
        return Lock(self)


class Lock:
    """Held while a mesh runs on the directory. Entering raises AlreadyExists where another process holds it."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Takes the lock."""
        self._descriptor = os.open(self._state.run / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            running = read_mesh(self._state)
            who = f" (pid {running.pid}, edge {running.edge})" if running else ""
            raise AlreadyExists(
                f"a mesh already runs on {self._state.root}{who}. Stop it with `helios down --state-dir "
                f"{self._state.root}`, or run a second one with another --state-dir, --port and --admin-port",
                reason="ALREADY_RUNNING",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the lock back."""
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One process of the mesh as mesh.json has it."""

    name: str
    state: str
    """``starting``, ``ready``, ``restarting`` or ``stopped``."""
    pid: int = 0
    started_at: float = 0.0
    """From ``process_started_at``: with the pid, it names one process."""
    restart_count: int = 0
    ops_address: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MeshRecord:
    """What mesh.json says."""

    pid: int
    started_at: float
    state: str
    """``starting``, ``ready``, ``stopping`` or ``failed``."""
    edge: str
    """``host:port`` of the public address."""
    admin: str
    """``host:port`` of the admin address."""
    model: str = ""
    failure: str = ""
    processes: tuple[ProcessRecord, ...] = ()
    stop_seconds: float = 0.0
    """How long it takes at most until it is gone, once it was told to stop."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this still runs."""
        return is_same_process(self.pid, self.started_at)


def is_same_process(pid: int, started_at: float) -> bool:
    """Returns whether a process with this pid and start time runs (a zombie does not)."""
    return pid > 0 and process_started_at(pid) == started_at


def process_started_at(pid: int) -> float | None:
    """Returns when a process began, in seconds since the machine's boot; None where none runs (a zombie does not).

    From the kernel rather than psutil's ``create_time``, which is wall-clock time, and another number for the same
    process once the clock was set. Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19]) / os.sysconf("SC_CLK_TCK")


def write_mesh(state: StateDirectory, record: MeshRecord) -> None:
    """Replaces mesh.json."""
    temporary = state.mesh_file.with_name(f".mesh.json.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(record), indent=1))
    temporary.replace(state.mesh_file)


def read_mesh(state: StateDirectory) -> MeshRecord | None:
    """Returns what mesh.json says, None where there is none. Raises PreconditionFailed where it can't be read."""
    try:
        fields = json.loads(state.mesh_file.read_text())
        processes = tuple(ProcessRecord(**entry) for entry in fields.pop("processes", ()))
        return MeshRecord(processes=processes, **fields)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    except OSError as error:
        raise PreconditionFailed(
            f"can't read {state.mesh_file} ({error.strerror}); name the mesh's directory with --state-dir"
        ) from error


def find_running(state: StateDirectory) -> MeshRecord:
    """Returns the mesh that runs on a state directory. Raises PreconditionFailed, saying what to do, where none
    does.
    """
    record = read_mesh(state)
    if record is None or not record.is_alive:
        raise PreconditionFailed(
            f"no mesh runs on {state.root}. Start one with `helios up`, or name its directory with --state-dir "
            "(or HELIOS_STATE_DIR)",
            reason="NOT_RUNNING",
        )
    return record


def _require_own(directory: Path) -> None:
    """Raises PreconditionFailed unless this is a directory of this user: a link or a stranger's is a trap."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PreconditionFailed(
            f"{directory} is not a directory of yours; remove it, or choose another --state-dir",
            reason="SOCKET_DIRECTORY_UNSAFE",
        )


def _write_once(path: Path, text: str) -> None:
    """Makes a file (mode 0600) with its whole content, unless it is there: a crash leaves no empty one behind."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
    finally:
        temporary.unlink()
