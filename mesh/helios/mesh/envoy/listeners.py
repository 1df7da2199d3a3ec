"""The two doors: the edge for everybody, the admin listener for the operator of this machine."""

from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLog,
    AccessLogFilter,
    AndFilter,
    HeaderFilter,
    ResponseFlagFilter,
)
from envoy_data_plane.envoy.config.core.v3 import (
    ApiVersion,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    Http1ProtocolOptions,
    HttpProtocolOptions,
    HttpProtocolOptionsHeadersWithUnderscoresAction,
    SubstitutionFormatString,
    TcpKeepalive,
)
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, Listener
from envoy_data_plane.envoy.config.route.v3 import HeaderMatcher, RouteConfiguration
from envoy_data_plane.envoy.config.trace.v3 import OpenTelemetryConfig, TracingHttp
from envoy_data_plane.envoy.extensions.access_loggers.file.v3 import FileAccessLog
from envoy_data_plane.envoy.extensions.access_loggers.grpc.v3 import CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig
from envoy_data_plane.envoy.extensions.access_loggers.stream.v3 import StdoutAccessLog
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpConnectionManagerCodecType,
    HttpConnectionManagerInternalAddressConfig,
    HttpConnectionManagerPathWithEscapedSlashesAction,
    HttpConnectionManagerTracing,
    HttpFilter,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from helios.mesh.envoy import clusters, filters, pack, replies, routes
from helios.mesh.envoy.headers import CLIENT_REQUEST_ID_HEADER, strip_client_headers
from helios.mesh.envoy.settings import EdgeSettings, replica_cluster
from helios.mesh.names import CLUSTER_HEADER, ENDPOINT_HEADER, METADATA_NAMESPACE, MODEL_KEY

EDGE = "edge"
ADMIN = "admin"
_LOG_FIELDS = {
    "time": "%START_TIME%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "client_request_id": f"%REQ({CLIENT_REQUEST_ID_HEADER}):128%",
    "traceparent": "%REQ(TRACEPARENT):64%",
    "method": "%REQ(:METHOD)%",
    # After transcoding :path is the gRPC path, and Envoy has put the caller's here.
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH):512%",
    "protocol": "%PROTOCOL%",
    "model": f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{MODEL_KEY}):256%",
    "status": "%RESPONSE_CODE%",
    "grpc_status": "%GRPC_STATUS%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "received_bytes": "%BYTES_RECEIVED%",
    "sent_bytes": "%BYTES_SENT%",
    "duration_ms": "%DURATION%",
    "first_byte_ms": "%RESPONSE_DURATION%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "cluster": "%UPSTREAM_CLUSTER_RAW%",
    "endpoint": "%UPSTREAM_HOST%",
    "picked": f"%REQ({ENDPOINT_HEADER}):256%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "user_agent": "%REQ(USER-AGENT):256%",
}


def edge_listener(settings: EdgeSettings) -> Listener:
    """Returns the public listener: REST and gRPC, HTTP/1.1 and h2c on one port."""
    services = routes.EDGE_REST_SERVICES
    chain = [
        filters.refusals(services, settings.limits),
        filters.error_shaping(services, settings.limits),
        filters.healthz(),
        filters.cors(),
        *filters.lift(),
        filters.transcoder(services, settings.limits),
        # With several proxies nobody is in the lane: each has a view of its own.
        *(() if settings.feeds else (filters.express(),)),
        filters.pick(settings),
        filters.picker(settings),
        filters.router(),
    ]
    manager = _manager(settings, EDGE, routes.edge_routes(settings), chain)
    manager.access_log += _unreached(settings)
    return _listener(EDGE, f"{settings.edge_host}:{settings.edge_port}", manager)


def admin_listener(settings: EdgeSettings) -> Listener:
    """Returns the admin listener. It has no CORS: no web page of another origin may read its answers."""
    services = routes.ADMIN_REST_SERVICES
    chain = [
        filters.only_local_pages(settings.admin_host, settings.admin_port),
        filters.bearer_token(settings.admin_token),
        filters.refusals(services, settings.limits),
        filters.error_shaping(services, settings.limits),
        filters.transcoder(services, settings.limits),
        filters.router(),
    ]
    manager = _manager(settings, ADMIN, routes.admin_routes(settings.limits), chain)
    return _listener(ADMIN, f"{settings.admin_host}:{settings.admin_port}", manager)


def _listener(name: str, address: str, manager: HttpConnectionManager) -> Listener:
    network_filter = Filter(name="envoy.filters.network.http_connection_manager", typed_config=Any.pack(manager))
    return Listener(
        name=name,
        address=pack.address(address),
        filter_chains=[FilterChain(filters=[network_filter])],
        # A second Envoy on the same port must fail, not share it.
        enable_reuse_port=False,
        # A client that is gone without a word frees its generation: HTTP/1.1 has no pings of its own.
        tcp_keepalive=TcpKeepalive(keepalive_time=60, keepalive_interval=10, keepalive_probes=3),
    )


def _manager(
    settings: EdgeSettings, name: str, route_config: RouteConfiguration, chain: list[HttpFilter]
) -> HttpConnectionManager:
    limits = settings.limits
    return HttpConnectionManager(
        # Envoy's own administration interface counts as "admin".
        stat_prefix=f"{name}_listener",
        codec_type=HttpConnectionManagerCodecType.AUTO,
        route_config=route_config,
        http_filters=chain,
        early_header_mutation_extensions=[strip_client_headers()],
        # The caller's address is the connection's, and nobody is internal: no client may steer Envoy by x-envoy-*
        # headers.
        use_remote_address=True,
        internal_address_config=HttpConnectionManagerInternalAddressConfig(),
        always_set_request_id_in_response=True,
        normalize_path=True,
        path_with_escaped_slashes_action=HttpConnectionManagerPathWithEscapedSlashesAction.KEEP_UNCHANGED,
        common_http_protocol_options=HttpProtocolOptions(
            # `x_helios_y` and `x-helios-y` would be one name to some servers.
            headers_with_underscores_action=HttpProtocolOptionsHeadersWithUnderscoresAction.REJECT_REQUEST
        ),
        # nginx speaks HTTP/1.0 to its upstreams unless told otherwise, and so does ab. The admin listener goes by
        # the Host header, which 1.0 does not demand.
        http_protocol_options=Http1ProtocolOptions(accept_http_10=name == EDGE, default_host_for_http_10="localhost"),
        http2_protocol_options=pack.http2(keepalive_seconds=30, timeout_seconds=15),
        stream_idle_timeout=pack.seconds(limits.stream_idle_seconds + limits.hold_limit_seconds),
        request_headers_timeout=pack.seconds(30),
        request_timeout=pack.seconds(limits.upload_seconds),
        local_reply_config=replies.own_replies(),
        access_log=[_access_log(settings)],
        tracing=_tracing(settings.otlp_endpoint),
    )


def _unreached(settings: EdgeSettings) -> list[AccessLog]:
    """Returns the logs by which proxies learn of requests that got to no replica, each of its own picks.

    There was no host, no connection, or no room for one; what a replica answered it tells of itself.
    """
    feeds = [(f"feed-{name}", replica_cluster(name)) for name, _ in settings.feeds] or [(clusters.PICKER, "")]
    return [_unreached_log(cluster, of) for cluster, of in feeds]


def _unreached_log(cluster: str, replicas: str) -> AccessLog:
    conditions = [
        AccessLogFilter(response_flag_filter=ResponseFlagFilter(flags=["UH", "UF", "UO", "NC", "URX"])),
        AccessLogFilter(header_filter=HeaderFilter(header=HeaderMatcher(name=ENDPOINT_HEADER, present_match=True))),
    ]
    if replicas:
        of = HeaderMatcher(name=CLUSTER_HEADER, string_match=StringMatcher(exact=replicas))
        conditions.append(AccessLogFilter(header_filter=HeaderFilter(header=of)))
    to_proxy = CommonGrpcAccessLogConfig(
        log_name="unreached",
        grpc_service=GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=cluster)),
        transport_api_version=ApiVersion.V3,
        # Few, and each at once: a timer would wake every thread for nothing.
        buffer_size_bytes=0,
        buffer_flush_interval=pack.seconds(3600),
    )
    return AccessLog(
        name="envoy.access_loggers.http_grpc",
        filter=AccessLogFilter(and_filter=AndFilter(filters=conditions)),
        # Who was picked nobody but Envoy knows, where it picked by itself.
        typed_config=Any.pack(
            HttpGrpcAccessLogConfig(common_config=to_proxy, additional_request_headers_to_log=[ENDPOINT_HEADER])
        ),
    )


def _access_log(settings: EdgeSettings) -> AccessLog:
    line = SubstitutionFormatString(json_format=pack.struct(_LOG_FIELDS), omit_empty_values=True)
    if settings.access_log is None:
        return AccessLog(name="envoy.access_loggers.stdout", typed_config=Any.pack(StdoutAccessLog(log_format=line)))
    to_file = FileAccessLog(path=pack.absolute(settings.access_log), log_format=line)
    return AccessLog(name="envoy.access_loggers.file", typed_config=Any.pack(to_file))


def _tracing(otlp_endpoint: str | None) -> HttpConnectionManagerTracing | None:
    if otlp_endpoint is None:
        return None
    exporter = OpenTelemetryConfig(
        grpc_service=GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=clusters.OTLP)),
        service_name="helios-edge",
    )
    return HttpConnectionManagerTracing(
        provider=TracingHttp(name="envoy.tracers.opentelemetry", typed_config=Any.pack(exporter)),
        spawn_upstream_span=True,
    )
