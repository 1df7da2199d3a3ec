"""What the gateway's Envoy has to be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from helios.mesh.identity import DEFAULT_TRUST_DOMAIN, IdentityFiles

LOOPBACK_HOST: Final = "127.0.0.1"
_FRAME_BYTES: Final = 1 << 20


def replica_cluster(name: str) -> str:
    """Returns the cluster of the endpoints that one of several proxies feeds."""
    return f"replicas-{name}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what clients and replicas may cost Envoy."""

    max_body_bytes: int = 32 << 20
    """Largest request body; a larger one is 413. 32 MiB: long contexts and images in base64, and the gRPC servers' own
    limit.
    """
    hold_limit_seconds: float = 600.0
    """Longest hold of a request. Envoy waits 30 s longer for the picker, whose own deadline must come first (503, not
    504).
    """
    stream_idle_seconds: float = 3600.0
    """How long a request may see no byte in either direction, beside the longest hold, which sees none either. An hour:
    above every prefill."""
    upload_seconds: float = 600.0
    """How long a client may take to send a whole request."""
    max_downstream_connections: int = 20_000
    """Connections of clients, both listeners together; further ones are closed at once."""
    max_heap_bytes: int = 3 << 30
    """Memory of Envoy: at 95 % it takes no new requests. 3 GiB: about 90 held bodies of the largest size."""
    connection_age_seconds: float = 3600.0
    """Connections to servers are replaced at this age, so that renewed certificates are taken up; running calls end
    first.
    """
    retry_count: int = 2
    """Further candidates that are tried before the first byte, where the picker does not say how many it named."""

    @property
    def upload_bytes(self) -> int:
        """What Envoy reads of a REST body at most; above the limit it is read to its end, then refused."""
        return 2 * self.max_body_bytes

    @property
    def message_bytes(self) -> int:
        """What Envoy buffers of a gRPC call at most: a body and its frame, as the mesh's servers take it."""
        return self.max_body_bytes + _FRAME_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSettings:
    """Everything that differs between two gateways. Addresses are "ip:port" or "unix:/path"."""

    directory: Path
    """Where the configuration and the SDS files are written; mode 0700."""
    envoy_admin: str
    """Envoy's own administration interface; a unix socket (mode 0600) in ``run/``. It has no authentication."""
    admin_token: str
    """The bearer token that the admin listener demands."""
    picker: tuple[str, ...]
    """Endpoint pickers (ext_authz, ext_proc) and ADS servers: the proxies."""
    feeds: tuple[tuple[str, str], ...] = ()
    """With several proxies: name and address of each one's endpoint feed. Each then has a cluster of its own,
    ``replica_cluster(name)``, and says with each pick that it is in there. Empty: one cluster, fed by ADS."""
    control: tuple[str, ...]
    """The proxies' control services: ModelService, AdminService, health, reflection."""
    registry: tuple[str, ...]
    """The registry, for the admin listener."""
    relay: tuple[str, ...] = ()
    """Where durable requests go. Empty: nowhere; they end with their replica, like others."""
    edge_identity: IdentityFiles | None = None
    """Leaf ``edge``, for the public listener's upstreams. None: no TLS (a sidecar adds it)."""
    admin_identity: IdentityFiles | None = None
    """Leaf ``admin-edge``, for the admin listener's upstreams."""
    edge_host: str = LOOPBACK_HOST
    edge_port: int = 8080
    """Public listener. 0 takes a free port; ``helios.mesh.envoy.admin`` tells which."""
    admin_host: str = LOOPBACK_HOST
    admin_port: int = 8081
    """Admin listener."""
    node_id: str = "edge"
    """Names this Envoy to the proxies; unique among the gateway's Envoys."""
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    namespace: str = "default"
    """Of the SPIFFE ids that servers must have."""
    access_log: Path | None = None
    """JSON lines, one a request. None: standard output."""
    otlp_endpoint: str | None = None
    """Collector of OpenTelemetry spans, "host:port" of a plaintext OTLP/gRPC receiver. None: no tracing by Envoy;
    clients' traceparent passes either way.
    """
    limits: Limits = field(default_factory=Limits)
