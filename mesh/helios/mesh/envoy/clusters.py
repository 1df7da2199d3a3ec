"""Where Envoy sends: the replicas, the relay, the picker, the control plane, the registry.

Every cluster speaks HTTP/2. Circuit breakers are Envoy's only as a bound against runaway: the breaker that knows
replicas is the proxy's, since override_host also sends to hosts that Envoy's outlier detection has ejected.
"""

from collections.abc import Iterable
from typing import Final

from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterDiscoveryType,
    ClusterEdsClusterConfig,
    LoadBalancingPolicy,
    LoadBalancingPolicyPolicy,
)
from envoy_data_plane.envoy.config.core.v3 import (
    AggregatedConfigSource,
    ApiConfigSource,
    ApiConfigSourceApiType,
    ApiVersion,
    BackoffStrategy,
    ConfigSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HealthCheck,
    HealthCheckGrpcHealthCheck,
    HttpProtocolOptions,
    RetryPolicy,
)
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host.v3 import (
    OverrideHost,
    OverrideHostOverrideHostSource,
)
from envoy_data_plane.envoy.extensions.load_balancing_policies.round_robin.v3 import RoundRobin
from envoy_data_plane.envoy.extensions.load_balancing_policies.subset.v3 import (
    Subset,
    SubsetLbSubsetFallbackPolicy,
    SubsetLbSubsetSelector,
    SubsetLbSubsetSelectorLbSubsetSelectorFallbackPolicy,
)
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions as UpstreamOptions,
)
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptionsExplicitHttpConfig,
)
from envoy_data_plane.google.protobuf import Any

from helios.mesh.envoy import pack
from helios.mesh.envoy.settings import EdgeSettings, replica_cluster
from helios.mesh.envoy.tls import upstream_tls
from helios.mesh.identity import IdentityFiles, server_name
from helios.mesh.names import ENDPOINT_HEADER

REPLICAS: Final = "replicas"
PICKER: Final = "picker"
CONTROL: Final = "control"
CONTROL_ADMIN: Final = "control-admin"
REGISTRY: Final = "registry"
RELAY: Final = "relay"
OTLP: Final = "otlp"

# Loopback and a rack answer in milliseconds; a SYN that is lost once is sent again after one second. TLS counts, too,
# and on a machine whose cores are all taken a handshake has taken more than two seconds.
_CONNECT_SECONDS: Final = 5.0
# How long an answer to a ping may take. A replica answers from its event loop, which twenty bodies of 20 MB at once,
# on busy cores, stopped for more than three seconds; one that hangs is ended by its supervisor.
_PING_SECONDS: Final = 3.0
_REPLICA_PING_SECONDS: Final = 15.0
# Envoy's defaults are 1,024 each, which held requests reach; memory and connections are bounded by the overload
# manager.
_MANY: Final = 100_000
_MAX_RETRIES: Final = 1_000
# HTTP/2's default SETTINGS_MAX_FRAME_SIZE, and what Envoy makes of a large body.
_FRAME_BYTES: Final = 16_384
# Envoy's default for the frames in a connection's queue.
_MIN_QUEUED_FRAMES: Final = 10_000
# A listener starts when its clusters are initialised; a proxy that publishes nothing yet must not delay /healthz.
_FIRST_ENDPOINTS_SECONDS: Final = 0.5


def all_clusters(settings: EdgeSettings) -> list[Cluster]:
    """Returns every cluster of the gateway."""
    edge, admin = settings.edge_identity, settings.admin_identity
    clusters = [
        *_replica_clusters(settings),
        _static(settings, PICKER, settings.picker, identity=edge, peer="proxy"),
        _static(settings, CONTROL, settings.control, identity=edge, peer="proxy", is_probed=True),
        _static(settings, CONTROL_ADMIN, settings.control, identity=admin, peer="proxy"),
        _static(settings, REGISTRY, settings.registry, identity=admin, peer="registry"),
    ]
    if settings.relay:
        clusters.append(_static(settings, RELAY, settings.relay, identity=edge, peer="relay"))
    if settings.otlp_endpoint is not None:
        clusters.append(_static(settings, OTLP, (settings.otlp_endpoint,), identity=None, peer=OTLP))
    return clusters


def _replica_clusters(settings: EdgeSettings) -> Iterable[Cluster]:
    """Yields where requests go: one cluster, or one for each of several proxies.

    A pick is good where its endpoint is known, and a proxy knows that of the Envoys that it feeds itself. Envoy has
    one ADS stream, to one proxy; what that one told Envoy says nothing of what another one may pick. With a cluster
    each, every proxy waits for its own acknowledgements, and one that dies takes nothing with it.
    """
    if not settings.feeds:
        wait = pack.seconds(_FIRST_ENDPOINTS_SECONDS)
        ads = AggregatedConfigSource()
        source = ConfigSource(ads=ads, resource_api_version=ApiVersion.V3, initial_fetch_timeout=wait)
        yield _replicas(settings, REPLICAS, source)
    for name, address in settings.feeds:
        feed = f"feed-{name}"
        yield _static(settings, feed, (address,), identity=settings.edge_identity, peer="proxy")
        source = ConfigSource(
            api_config_source=endpoint_feed(feed),
            resource_api_version=ApiVersion.V3,
            initial_fetch_timeout=pack.seconds(_FIRST_ENDPOINTS_SECONDS),
        )
        yield _replicas(settings, replica_cluster(name), source)


def endpoint_feed(cluster: str) -> ApiConfigSource:
    """Returns how to read endpoints from a cluster of proxies, by delta xDS."""
    # A proxy that comes back is met within a second; Envoy's default may wait 30 s.
    pause = BackoffStrategy(base_interval=pack.seconds(0.1), max_interval=pack.seconds(1))
    # The pauses between streams of xDS are EnvoyGrpc's. GrpcService has a field of the same name, for single calls.
    service = GrpcService(
        envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=cluster, retry_policy=RetryPolicy(retry_back_off=pause))
    )
    return ApiConfigSource(
        api_type=ApiConfigSourceApiType.DELTA_GRPC,
        transport_api_version=ApiVersion.V3,
        grpc_services=[service],
        set_node_on_first_message_only=True,
    )


def _replicas(settings: EdgeSettings, name: str, source: ConfigSource) -> Cluster:
    return _cluster(
        settings,
        name,
        identity=settings.edge_identity,
        peer="worker",
        type=ClusterDiscoveryType.EDS,
        # Every proxy calls them the same.
        eds_cluster_config=ClusterEdsClusterConfig(eds_config=source, service_name=REPLICAS),
        load_balancing_policy=_picked_endpoint_or_nothing(),
        ignore_health_on_host_removal=True,
    )


def _picked_endpoint_or_nothing() -> LoadBalancingPolicy:
    """Takes the endpoints that the picker named, in order, and none else.

    The fallback is a subset that no endpoint is in: a stale pick, or a list that is used up, is a clean 503. With an
    ordinary fallback it would silently go to a replica of any model.
    """
    never = Subset(
        fallback_policy=SubsetLbSubsetFallbackPolicy.NO_FALLBACK,
        subset_selectors=[
            SubsetLbSubsetSelector(
                keys=["never"],
                fallback_policy=SubsetLbSubsetSelectorLbSubsetSelectorFallbackPolicy.NO_FALLBACK,
            )
        ],
        subset_lb_policy=_policy("envoy.load_balancing_policies.round_robin", RoundRobin()),
    )
    picked = OverrideHost(
        override_host_sources=[OverrideHostOverrideHostSource(header=ENDPOINT_HEADER)],
        fallback_policy=_policy("envoy.load_balancing_policies.subset", never),
    )
    return _policy("envoy.load_balancing_policies.override_host", picked)


def _policy(name: str, message: OverrideHost | Subset | RoundRobin) -> LoadBalancingPolicy:
    return LoadBalancingPolicy(
        policies=[LoadBalancingPolicyPolicy(typed_extension_config=pack.extension(name, message))]
    )


def _static(
    settings: EdgeSettings,
    name: str,
    addresses: Iterable[str],
    *,
    identity: IdentityFiles | None,
    peer: str,
    is_probed: bool = False,
) -> Cluster:
    endpoints = [LbEndpoint(endpoint=Endpoint(address=pack.address(text))) for text in addresses]
    assignment = ClusterLoadAssignment(cluster_name=name, endpoints=[LocalityLbEndpoints(lb_endpoints=endpoints)])
    return _cluster(
        settings,
        name,
        identity=identity,
        peer=peer,
        type=ClusterDiscoveryType.STATIC,
        load_assignment=assignment,
        health_checks=[_probe(peer)] if is_probed else [],
    )


def _probe(peer: str) -> HealthCheck:
    """Makes /healthz honest. A stale result harms no request: with no healthy host Envoy tries all of them."""
    return HealthCheck(
        timeout=pack.seconds(1),
        # A probe costs what a pick does. One that failed is asked again sooner.
        interval=pack.seconds(3),
        no_traffic_healthy_interval=pack.seconds(3),
        no_traffic_interval=pack.seconds(1),
        unhealthy_interval=pack.seconds(1),
        unhealthy_edge_interval=pack.seconds(1),
        unhealthy_threshold=2,
        healthy_threshold=1,
        grpc_health_check=HealthCheckGrpcHealthCheck(authority=server_name(peer)),
    )


def _cluster(
    settings: EdgeSettings, name: str, *, identity: IdentityFiles | None, peer: str, **fields: object
) -> Cluster:
    limits = CircuitBreakersThresholds(
        max_connections=_MANY, max_pending_requests=_MANY, max_requests=_MANY, max_retries=_MAX_RETRIES
    )
    protocol = UpstreamOptions(
        common_http_protocol_options=HttpProtocolOptions(
            max_connection_duration=pack.seconds(settings.limits.connection_age_seconds)
        ),
        explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(
            http2_protocol_options=pack.http2(
                keepalive_seconds=5,
                timeout_seconds=_REPLICA_PING_SECONDS if peer == "worker" else _PING_SECONDS,
                # A body is queued whole. Envoy's limit is 160 MB of such frames: five bodies at once, and the sixth
                # would have ended all calls of the connection (502). The heap is what bounds them.
                max_outbound_frames=max(_MIN_QUEUED_FRAMES, settings.limits.max_heap_bytes // _FRAME_BYTES),
            )
        ),
    )
    cluster = Cluster(
        name=name,
        connect_timeout=pack.seconds(_CONNECT_SECONDS),
        circuit_breakers=CircuitBreakers(thresholds=[limits]),
        typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": Any.pack(protocol)},
        **fields,  # type: ignore[arg-type]
    )
    if identity is not None:
        cluster.transport_socket = upstream_tls(settings, identity, peer)
    return cluster
