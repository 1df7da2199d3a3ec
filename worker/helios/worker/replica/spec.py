"""What a replica is told when it is forked: everything it needs, decided by the supervisor."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from helios.mesh.errors import InvalidRequest
from helios.worker.replica.settings import EngineSettings, LoraAdapter


@dataclass(frozen=True, slots=True)
class Placement:
    """Which processor cores a replica's engine computes on. Its other processes are placed from outside."""

    engine_cores: tuple[int, ...] = ()
    """Cores of the process that computes; it uses one thread for each. Empty: one thread, any core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One replica to be.

    Attributes:
        replica_id: Unique over the life of the cluster.
        model: The model's own name; responses carry it.
        served_names: Every name a request may use for it, aliases included; ``model`` is added where it is missing.
        revision: Digest of the revision's manifest, ``sha256:<hex>``.
        model_path: Directory with config.json, tokenizer files and safetensors; stays readable while the replica lives.
        engine: Which adapter runs it, such as "vllm".
        options: Settings of an engine other than vLLM, by name; each engine documents its own and refuses others.
        settings: How the engine is set, beyond what is said here.
        revision_paths: Directories of further revisions that the settings name (a draft model, adapters), by digest.
        kv_cache_bytes: Size of the KV cache.
        max_context_tokens: Longest prompt plus answer; 0: the model's own limit, cut to what the KV cache holds.
        memory_bytes: Memory booked for it on its device; reported back in hellos so that a ledger can be rebuilt.
        lease_id: Lease of its weights at the storage agent.
        device_ids: Devices that it runs on; reported back in hellos.
        device_uuids: Of these, those that CUDA_VISIBLE_DEVICES is to name; empty for a CPU.
        memory_items: What ``memory_bytes`` is made of, by kind; reported back in hellos.
        host_memory_items: What is booked for it in host memory beside, by kind; reported back in hellos.
        host: Address its gRPC server binds, without the port.
        port: Port of its gRPC server; 0 lets the kernel choose.
        supervisor_address: gRPC target of the supervisor's socket, such as ``unix:/run/…``; empty for none (tests).
        identity_directory: Directory with the worker's leaf (tls.crt, tls.key, ca.crt); empty serves without TLS.
        log_path: File that standard output and error of the whole process tree are appended to; empty inherits.
        compile_cache_directory: Where this node keeps compiled code; empty: the engine's own place.
        packed_weights_directory: Where this node keeps weights that are mapped; empty: they are loaded.
        packed_weights_bytes: What is kept there of all models; None: any number.
        artifact_door: Socket of the supervisor where artifacts are asked for; empty: there are none.
        artifact_seconds: How long the start may wait for one.
        early_door: Socket of the supervisor where a load asks which bytes of ``model_path`` are here; empty: all are.
        kv_directory: Where KV caches lie that travel between this node's replicas through files; empty: they don't.
        created_at: When its start was asked for, with a time zone.
        placement: Cores.
        is_background: Whether it computes with what others leave until it is ready: nobody waits for it.
        max_running_requests: How many requests the engine works on at once, where the settings do not say; more wait
            inside it.
        drain_seconds: How long running requests may go on when nobody says otherwise (SIGTERM, orphaned).
        orphan_seconds: How long it lives on without its supervisor, until the supervisor's welcome says otherwise.
        stall_seconds: An engine that has requests and does nothing for this long is given up.
        traceparent: W3C trace context of the request that asked for the start; empty for none.
        asked_at: When its fork was asked for, on the node's monotonic clock, where its own phases begin; 0: when the
            launcher is told.
        otlp_endpoint: Where spans go; empty for nowhere.
        ops_listen: Address of /metrics, /healthz and /readyz; port 0 lets the kernel choose, and the log says which.
            Empty for none.
        log_level: Level of Helios's own records.
    """

    replica_id: str
    model: str
    revision: str
    model_path: str
    served_names: tuple[str, ...] = ()
    engine: str = "vllm"
    options: Mapping[str, str] = field(default_factory=dict)
    settings: EngineSettings = field(default_factory=EngineSettings)
    revision_paths: Mapping[str, str] = field(default_factory=dict)
    kv_cache_bytes: int = 96 << 20
    max_context_tokens: int = 0
    memory_bytes: int = 0
    lease_id: str = ""
    device_ids: tuple[str, ...] = ()
    device_uuids: tuple[str, ...] = ()
    memory_items: Mapping[str, int] = field(default_factory=dict)
    host_memory_items: Mapping[str, int] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 0
    supervisor_address: str = ""
    identity_directory: str = ""
    log_path: str = ""
    compile_cache_directory: str = ""
    packed_weights_directory: str = ""
    packed_weights_bytes: int | None = None
    artifact_door: str = ""
    artifact_seconds: float = 15.0
    early_door: str = ""
    kv_directory: str = ""
    created_at: datetime
    placement: Placement = Placement()
    is_background: bool = False
    max_running_requests: int = 64
    drain_seconds: float = 30.0
    orphan_seconds: float = 60.0
    stall_seconds: float = 120.0
    traceparent: str = ""
    asked_at: float = 0.0
    otlp_endpoint: str = ""
    ops_listen: str = "127.0.0.1:0"
    log_level: str = "info"

    @property
    def names(self) -> tuple[str, ...]:
        """The model's own name first, then every alias once."""
        return tuple(dict.fromkeys((self.model, *self.served_names)))

    @property
    def adapters(self) -> tuple[LoraAdapter, ...]:
        """The adapters that requests may name instead of the model."""
        return self.settings.lora.adapters if self.settings.lora is not None else ()

    def to_document(self) -> dict[str, Any]:
        """Returns the spec as JSON values."""
        document = dataclasses.asdict(self)
        document["created_at"] = self.created_at.isoformat()
        return document

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        """Reads what ``to_document`` wrote. Raises InvalidRequest for a document that is not a spec."""
        try:
            values = dict(document)
            values["created_at"] = datetime.fromisoformat(values["created_at"])
            for name in ("served_names", "device_ids", "device_uuids"):
                values[name] = tuple(values[name])
            values["settings"] = EngineSettings.from_document(values["settings"])
            values["placement"] = Placement(tuple(values["placement"]["engine_cores"]))
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"not a replica spec: {error}") from error
