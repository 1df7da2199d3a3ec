"""Settings of the worker's supervisor."""

import ipaddress
import os
import socket
from pathlib import Path
from typing import ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from helios.mesh.settings import ProcessSettings
from helios.worker.supervisor.ledger import MAX_SLOTS

SOCKET_PATH_LIMIT: Final = 107
"""sockaddr_un.sun_path, less its final zero. Source: unix(7)."""

_FROZEN = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DeviceSettings(BaseModel):
    """What replicas may use of this node."""

    model_config = _FROZEN

    memory_bytes: int | None = Field(default=None, ge=0)
    """Host memory that replicas may book, in bytes. None: 60 % of the machine's memory, or of the cgroup's limit where
    that is less; the rest is for the page cache with the weights, and for everybody else."""
    gpu_memory_ratio: float = Field(default=0.92, gt=0, le=1)
    """Share of each GPU's or MIG slice's memory that replicas may book. 0.92: the driver and other processes take the
    rest; vLLM's own default."""
    staging_bytes: int | None = Field(default=None, ge=0)
    """Host memory for staged models (weights in memory, no process), in bytes. None: a fifth of the machine's memory,
    or of the cgroup's limit where that is less. 0: nothing is staged."""
    telemetry_seconds: float = Field(default=2.0, gt=0)
    """How often devices are measured (memory, utilisation, temperature, errors); what changed goes to the proxies."""
    engine_core_count: int = Field(default=1, ge=0)
    """Cores that one replica's engine computes on. 1: the other cores serve, which is the fastest on small machines.
    0: placement is left to the kernel."""
    cores: tuple[int, ...] = ()
    """Cores to place replicas on. Empty: those that this process may run on."""


class ReplicaSettings(BaseModel):
    """How replicas are started and ended; seconds."""

    model_config = _FROZEN

    engine: str = "vllm"
    """Engine where a command names none: "vllm", "transformers", "simulated", "custom:<module>:<Class>". Its launcher
    is started with the worker, those of the others by their first replica."""
    memory_bytes: int = Field(default=1536 << 20, gt=0)
    """Booked where a command names no memory. 1.5 GiB: a small model on vLLM with its weights, three processes."""
    kv_cache_bytes: int = Field(default=96 << 20, gt=0)
    """KV cache where a command names none. 96 MiB: 4,000 tokens of a small model, zeroed in 0.2 s."""
    fetch_seconds: float = Field(default=1800.0, gt=0)
    """How long no byte of the weights may come to the node. Half an hour: a hub that is away, or fetches that go first;
    while bytes come, they may take as long as they like."""
    start_seconds: float = Field(default=120.0, gt=0)
    """From the fork to ready, beside what its bytes take at `least_bytes_per_second`; a start that takes longer hangs
    and is killed. 120: the slowest engine start seen, times four."""
    background_start_seconds: float = Field(default=1800.0, gt=0)
    """The same, of a replica that is to take the place of one that serves, and gets what the others leave of the cores,
    or that may have to compile. Half an hour: a compile of two minutes, on cores that are nearly always taken."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long requests may go on where a drain names no time, and when the worker stops. 0: they are cut off."""
    drain_grace_seconds: float = Field(default=3.0, ge=0)
    """On top of a drain, for the replica to exit by itself before its tree is killed."""
    report_interval_seconds: float = Field(default=0.1, gt=0, le=10)
    """How often a replica reports its load while it changes. 0.1: a picker's view is then at most that old."""
    orphan_seconds: float = Field(default=60.0, gt=0)
    """How long replicas live on without a supervisor. 60: a restart takes seconds, an upgrade less than a minute."""
    sleep_seconds: float = Field(default=60.0, gt=0)
    """How long a replica may take to put its weights and KV cache off its device, before it is killed."""
    wake_seconds: float = Field(default=120.0, gt=0)
    """How long a sleeping replica may take to be ready again, its weights loaded and its canary checked, beside what
    its bytes take at `least_bytes_per_second`."""
    least_bytes_per_second: float = Field(default=64 << 20, gt=0)
    """How slowly a replica may load what it books, in bytes per second: no fixed time is right for a model of 100 MB
    and one of 100 GB. 64 MiB: a network disk; a replica of 80 GiB then has 20 minutes more than a small one."""
    sleep_left_bytes: int = Field(default=1 << 30, ge=0)
    """Booked on each device of a sleeping replica that can't measure what it left there. 1 GiB: a CUDA context with
    vLLM's kernels, cuBLAS workspaces and NCCL's buffers."""
    sleep_cycle_limit: int = Field(default=20, ge=0)
    """How often a replica may wake; after that it is replaced by a new one instead of being put to sleep. 20: a
    fragmented address space, or a leak of the driver, does not last for days. 0: replicas never sleep."""
    silence_seconds: float = Field(default=30.0, ge=0)
    """A ready replica that says nothing for this long hangs, and is killed; it reports every second. 30: an event loop
    that one huge request keeps busy, or a machine that swaps, is not hung. 0: silence is borne for ever."""
    stall_seconds: float = Field(default=120.0, gt=0)
    """A replica whose engine has requests and does nothing for this long gives up. 120: a step of a large model on a
    slow CPU takes a minute."""
    early_load: bool = True
    """Whether a replica is forked, and loads, while its weights are still on their way, where every part of them can be
    verified as it comes (vLLM; the registry knows the chunks). It is ready when all is verified. False: all is fetched,
    then the replica is forked."""
    lease_ttl_seconds: float = Field(default=60.0, ge=5, le=3600)
    """Life of the lease of a replica's weights from each renewal; what a supervisor has to come back in."""


class ArtifactSettings(BaseModel):
    """What workers make for one another: compiled code, so that a model is compiled on one node of many."""

    model_config = _FROZEN

    take: bool = True
    """Whether artifacts of other workers are used. They are code that runs with this worker's rights, so False trusts
    no other worker; what this one made itself is used all the same."""
    publish: bool = True
    """Whether others may have what this worker made."""
    take_seconds: float = Field(default=15.0, gt=0)
    """How long a start that would have to compile may wait for an artifact; then it compiles. 15: some MiB over any
    network, against a minute or more of compiling."""
    publish_seconds: float = Field(default=300.0, gt=0)
    """How long an upload may take before it is given up; nobody waits for it."""
    publish_weights: Literal["remote", "always", "never"] = "remote"
    """Whether others may have weights that were packed here, which are as large as the weights. ``remote``: where the
    registry is on another machine. One on this machine would keep a second copy on the same disk, for nodes that are
    likely not to be there."""
    publish_weights_bytes: int = Field(default=2 << 30, ge=0)
    """Up to which size. 2 GiB: the largest artifact that a registry takes, and an eighth of what it keeps, if its own
    `artifacts.max_bytes` and `artifacts.quota_bytes` are not set."""
    take_weights_seconds: float = Field(default=300.0, gt=0, le=580)
    """How long it may take to bring packed weights here; then the node packs them by itself. Nobody waits for it. 300:
    16 GB over a gigabit network."""


class LauncherSettings(BaseModel):
    """The processes that replicas are forked from."""

    model_config = _FROZEN

    pool_size: int = Field(default=2, ge=1, le=4)
    """Launchers that stand ready for each engine. All but one are forks that share its memory and wait: when one dies,
    the next start goes to another at once, instead of waiting some ten seconds for the imports. 1: it waits."""
    idle_seconds: float = Field(default=900.0, ge=0)
    """Launchers of an engine that is not the default one end when no replica was started for so long; replicas that run
    go on. 900: the engine is imported anew for the next one, in seconds. 0: they stay."""


def is_on_this_machine(target: str) -> bool:
    """Whether a gRPC target is a unix socket or a loopback address; a machine's other addresses are not looked up."""
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class WorkerSettings(ProcessSettings):
    """Everything that can be set for ``python -m helios.worker``."""

    process_name: ClassVar[str] = "worker"

    worker_id: str = Field(default_factory=socket.gethostname, min_length=1)
    """Name of this worker in the fleet, stable over restarts. The host's name: one worker a node."""
    node: str = Field(default_factory=socket.gethostname, min_length=1)
    """Name of the node. The host's name."""
    zone: str = ""
    """Zone of the node, such as a cloud's availability zone; gateways that know theirs (`proxy.routing.zone`) send to
    the nearer of replicas that are as busy. Empty: not known."""
    proxies: tuple[str, ...] = ()
    """``host:port`` or ``unix:/path`` of the fleet service of every proxy, and ``dns:NAME:PORT``, which stands for all
    addresses of a name (a headless service of Kubernetes). Empty: nobody sends work."""
    proxies_resolve_seconds: float = Field(default=5.0, gt=0)
    """How often names in ``proxies`` are resolved. 5: as long as cluster DNS keeps its answers."""
    storage_target: str = "127.0.0.1:9200"
    """``host:port`` or ``unix:/path`` of the node's storage agent."""
    registry_target: str = ""
    """``host:port`` or ``unix:/path`` of the registry, which keeps artifacts. Empty: they are not shared."""
    state_directory: Path = Path("worker")
    """Holds ``replicas.json``, the list that a restarted supervisor finds its replicas by; made when it is not there.
    """
    log_directory: Path | None = None
    """Directory for one log file a replica. None: ``logs`` in the state directory."""
    supervisor_listen: str = ""
    """``unix:/path`` where replicas report. Empty: ``supervisor.sock`` in the state directory. Such a path has
    at most 107 bytes."""
    engine_directory: Path | None = None
    """Directory with the modules of your own engines (``custom:<module>:<Class>``), ahead of PYTHONPATH. None:
    ``engines`` in the state directory. Whoever can write there runs code as the worker."""
    listen_host: str = "127.0.0.1"
    """Address that replicas bind and are dialled at."""
    base_port: int = Field(default=0, ge=0, le=65_527)
    """Port of slot 0; the other slots follow. 0: a free port for each replica, for many workers on one machine."""
    slot_count: int = Field(default=MAX_SLOTS, ge=1, le=MAX_SLOTS)
    """Replicas at once. 8: as many target ports as an InferencePool takes."""
    resync_seconds: float = Field(default=2.0, ge=0)
    """How long a supervisor that starts waits for its replicas before it says hello to the proxies; less when all are
    back. 2: replicas dial again at least once a second."""
    return_seconds: float = Field(default=15.0, gt=0)
    """How long a known replica may stay silent after a restart of the supervisor before its tree is killed."""
    on_stop: Literal["drain", "leave"] = "drain"
    """``drain``: stopping the worker ends its replicas. ``leave``: they live on for a successor (an upgrade)."""
    packed_weights_bytes: int = Field(default=32 << 30, ge=0)
    """Disk for weights that replicas map instead of making copies of their own (on a CPU), beside the revisions; what
    was used longest ago goes first, and the disk's last tenth is left. 32 GiB: some models of 7e9 parameters in bf16.
    0: replicas load their weights."""
    device: DeviceSettings = Field(default_factory=DeviceSettings)
    """Devices."""
    replica: ReplicaSettings = Field(default_factory=ReplicaSettings)
    """Replicas."""
    launcher: LauncherSettings = Field(default_factory=LauncherSettings)
    """Launchers."""
    artifacts: ArtifactSettings = Field(default_factory=ArtifactSettings)
    """What is shared with other workers."""

    @property
    def stop_limit_seconds(self) -> float:
        """How long the whole stop may take: replicas drain first."""
        return self.stop_seconds + (self.replica.drain_seconds if self.on_stop == "drain" else 0.0)

    @property
    def class_path(self) -> Path:
        """Where the modules of users' engines are."""
        return (self.engine_directory or self.state_directory / "engines").absolute()

    @property
    def socket_target(self) -> str:
        """The gRPC target where replicas report."""
        return self.supervisor_listen or f"unix:{(self.state_directory / 'supervisor.sock').absolute()}"

    @property
    def replica_log_directory(self) -> Path:
        """Where replicas log."""
        return (self.log_directory or self.state_directory / "logs").absolute()

    @property
    def compile_cache_directory(self) -> Path:
        """Where compiled code is kept."""
        return (self.state_directory / "compiled").absolute()

    @property
    def packed_weights_directory(self) -> Path:
        """Where weights are kept that replicas map."""
        return (self.state_directory / "packed").absolute()

    @property
    def artifact_door(self) -> Path | None:
        """The socket where replicas ask for artifacts; None where there is nobody to ask, or no room for its name."""
        path = Path(f"{self.socket_target.removeprefix('unix:')}.a")
        return path if self.registry_target and len(str(path).encode()) <= SOCKET_PATH_LIMIT else None

    @property
    def early_door(self) -> Path | None:
        """The socket where loads ask what is here; None where none begins early, or there is no room for its name."""
        path = Path(f"{self.socket_target.removeprefix('unix:')}.e")
        return path if self.replica.early_load and len(str(path).encode()) <= SOCKET_PATH_LIMIT else None

    @property
    def early_directory(self) -> Path:
        """Where early loads see their files."""
        return (self.state_directory / "early").absolute()

    @property
    def published_weights_bytes(self) -> int:
        """Up to which size packed weights are given away; 0: none are."""
        artifacts = self.artifacts
        is_near = artifacts.publish_weights == "remote" and is_on_this_machine(self.registry_target)
        return 0 if is_near or artifacts.publish_weights == "never" else artifacts.publish_weights_bytes

    @property
    def artifact_scratch(self) -> Path:
        """Where artifacts are packed."""
        return (self.state_directory / "artifacts").absolute()

    @property
    def usable_cores(self) -> tuple[int, ...]:
        """The cores to place replicas on."""
        return self.device.cores or tuple(sorted(os.sched_getaffinity(0)))
