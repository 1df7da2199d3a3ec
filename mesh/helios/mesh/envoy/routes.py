"""Which path goes where, on either listener.

The transcoder rewrites a REST path to the gRPC path and has the route chosen again, so routes name gRPC paths and
serve REST and gRPC alike. The REST prefixes are there for one reason only: a filter before the transcoder buffers
the body, and the buffer's limit comes from the route of the *original* path (without such a route it is 1 MiB).

An inference request that names its model neither in the header nor in a JSON body has a route of its own, on which
ext_proc buffers from the start: the picker will want the body.
"""

import re
from collections.abc import Iterable
from typing import Final

import betterproto2
from envoy_data_plane.envoy.config.core.v3 import DataSource
from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    HeaderMatcher,
    RetryPolicy,
    RetryPolicyRetryBackOff,
    RetryPolicyRetryHostPredicate,
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.filters.http.cors.v3 import CorsPolicy
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExtProcOverrides,
    ExtProcPerRoute,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.type.matcher.v3 import (
    MetadataMatcher,
    MetadataMatcherPathSegment,
    RegexMatcher,
    StringMatcher,
    ValueMatcher,
)
from envoy_data_plane.google.protobuf import Any

from helios.mesh.envoy import clusters, pack
from helios.mesh.envoy.headers import AUTHORIZATION_HEADER, CLIENT_REQUEST_ID_HEADER, kept_for_answer
from helios.mesh.envoy.settings import EdgeSettings, Limits
from helios.mesh.names import (
    CLUSTER_HEADER,
    DURABLE_AUTO,
    DURABLE_HEADER,
    METADATA_NAMESPACE,
    MODEL_HEADER,
    MODEL_KEY,
    RATE_LIMIT_HEADERS,
    REFUSAL_REASON_HEADER,
    TIER_HEADER,
)

OPENAI_SERVICE: Final = "helios.api.inference.v1.OpenAIService"
INFERENCE_SERVICE: Final = "helios.api.inference.v1.InferenceService"
MODEL_SERVICE: Final = "helios.api.catalog.v1.ModelService"
ADMIN_SERVICE: Final = "helios.api.admin.v1.AdminService"
REGISTRY_SERVICE: Final = "helios.api.registry.v1.RegistryService"
ARTIFACT_SERVICE: Final = "helios.api.registry.v1.ArtifactService"
PUSH_SERVICE: Final = "helios.api.registry.v1.PushService"
VERSION_SERVICE: Final = "helios.api.registry.v1.VersionService"
SYNC_SERVICE: Final = "helios.api.registry.v1.SyncService"
ROLLOUT_SERVICE: Final = "helios.api.registry.v1.RolloutService"
FOLLOW_SERVICE: Final = "helios.api.registry.v1.FollowService"
PROFILE_SERVICE: Final = "helios.api.registry.v1.ProfileService"
KEY_SERVICE: Final = "helios.api.registry.v1.KeyService"
PREFETCH_SERVICE: Final = "helios.api.registry.v1.PrefetchService"
USAGE_SERVICE: Final = "helios.api.registry.v1.UsageService"
LEASE_SERVICE: Final = "helios.api.registry.v1.LeaseService"
HEALTH_SERVICE: Final = "grpc.health.v1.Health"
EDGE_REST_SERVICES: Final = (OPENAI_SERVICE, MODEL_SERVICE)
REGISTRY_SERVICES: Final = (
    REGISTRY_SERVICE,
    ARTIFACT_SERVICE,
    PUSH_SERVICE,
    VERSION_SERVICE,
    SYNC_SERVICE,
    ROLLOUT_SERVICE,
    FOLLOW_SERVICE,
    PROFILE_SERVICE,
    KEY_SERVICE,
    USAGE_SERVICE,
    PREFETCH_SERVICE,
    LEASE_SERVICE,
)
ADMIN_REST_SERVICES: Final = (MODEL_SERVICE, ADMIN_SERVICE, *REGISTRY_SERVICES)

CORS_FILTER: Final = "envoy.filters.http.cors"
PICKER_FILTER: Final = "envoy.filters.http.ext_proc"

# Before the first byte only: Envoy never retries once it has sent response headers. `reset` is for a replica that is
# killed during prefill, `unavailable` for one that refuses because it drains.
_RETRY_ON: Final = "connect-failure,refused-stream,unavailable,reset,reset-before-request"
# What another replica may answer is the relay's to try.
_RETRY_RELAY_ON: Final = "connect-failure,refused-stream"
_IS_DURABLE: Final = StringMatcher(safe_regex=RegexMatcher(regex=f"true|{DURABLE_AUTO}"))
# Calls whose answers can go on on another replica.
DURABLE_METHODS: Final = {
    OPENAI_SERVICE: ("CreateChatCompletion", "CreateCompletion"),
    INFERENCE_SERVICE: ("Chat", "Complete"),
}
# Browsers' preflights ask for these; "*" covers the rest (openai's x-stainless-*), but never stands for authorization.
_CORS_REQUEST_HEADERS: Final = (
    "authorization, content-type, openai-organization, openai-project, openai-beta, x-request-id, "
    f"{CLIENT_REQUEST_ID_HEADER}, {MODEL_HEADER}, {DURABLE_HEADER}, {TIER_HEADER}, "
    "traceparent, tracestate, idempotency-key, *"
)
_CORS_RESPONSE_HEADERS: Final = ", ".join(
    (
        "x-request-id",
        "retry-after",
        "x-should-retry",
        "openai-processing-ms",
        REFUSAL_REASON_HEADER,
        *RATE_LIMIT_HEADERS,
        TIER_HEADER,
    )
)


def edge_routes(settings: EdgeSettings) -> RouteConfiguration:
    """Returns the public listener's routes."""
    limits = settings.limits
    inference = [
        _inference(route, settings)
        for service in (OPENAI_SERVICE, INFERENCE_SERVICE)
        for route in (
            _nameless(service, limits),
            _grpc(service, clusters.REPLICAS, limits, retry_policy=_retries(limits)),
        )
    ]
    durable = [
        _durable(_inference(route, settings), methods)
        for service, methods in DURABLE_METHODS.items()
        for route in (_nameless(service, limits), _grpc(service, clusters.RELAY, limits))
        if settings.relay
    ]
    control = [
        _unpicked(_grpc(service, clusters.CONTROL, limits, retry_policy=_at_another_proxy()))
        for service in (MODEL_SERVICE, HEALTH_SERVICE)
    ]
    reflection = _unpicked(_forward("/grpc.reflection.", clusters.CONTROL, limits.message_bytes))
    others = [_unpicked(route) for route in _unknown("/v1/", clusters.CONTROL, limits)]
    host = VirtualHost(
        name="edge",
        domains=["*"],
        routes=[*durable, *inference, *control, reflection, *others],
        typed_per_filter_config={CORS_FILTER: Any.pack(_any_origin())},
    )
    return RouteConfiguration(name="edge", virtual_hosts=[host])


def admin_routes(limits: Limits) -> RouteConfiguration:
    """Returns the admin listener's routes."""
    control = (ADMIN_SERVICE, MODEL_SERVICE, HEALTH_SERVICE)
    routes = [
        *(_grpc(service, clusters.CONTROL_ADMIN, limits, retry_policy=_at_another_proxy()) for service in control),
        _forward("/grpc.reflection.", clusters.CONTROL_ADMIN, limits.message_bytes),
        *(_grpc(service, clusters.REGISTRY, limits) for service in REGISTRY_SERVICES),
        *_unknown("/admin/v1/", clusters.CONTROL_ADMIN, limits),
    ]
    return RouteConfiguration(name="admin", virtual_hosts=[VirtualHost(name="admin", domains=["*"], routes=routes)])


def _inference(route: Route, settings: EdgeSettings) -> Route:
    """Keeps API keys from replicas (the picker has read them before), and says where the caller's limits stand.

    With several proxies, the one that picks says in which cluster its endpoints are.
    """
    if settings.feeds:
        assert route.route is not None, "an inference route forwards"
        route.route.cluster, route.route.cluster_header = None, CLUSTER_HEADER
    route.request_headers_to_remove = [AUTHORIZATION_HEADER]
    route.response_headers_to_add = kept_for_answer((*RATE_LIMIT_HEADERS, TIER_HEADER))
    return route


def _durable(route: Route, methods: Iterable[str]) -> Route:
    """Sends requests that are to outlive their replica to the relay, which tries other replicas by itself.

    It goes by the header, which the client has sent, or the picker, by its model's policy: that one has Envoy choose
    the route again.
    """
    assert route.route is not None, "an inference route forwards"
    assert route.match is not None, "and fits a path"
    route.match.safe_regex = RegexMatcher(regex=f"{re.escape(route.match.prefix or '')}({'|'.join(methods)})")
    route.match.prefix = None
    route.match.headers.append(HeaderMatcher(name=DURABLE_HEADER, string_match=_IS_DURABLE))
    route.route.cluster, route.route.cluster_header = clusters.RELAY, None
    route.route.retry_policy = RetryPolicy(retry_on=_RETRY_RELAY_ON, num_retries=1)
    return route


def _grpc(service: str, cluster: str, limits: Limits, *, retry_policy: RetryPolicy | None = None) -> Route:
    return _forward(f"/{service}/", cluster, limits.message_bytes, retry_policy=retry_policy)


def _forward(prefix: str, cluster: str, buffer_bytes: int, *, retry_policy: RetryPolicy | None = None) -> Route:
    return Route(
        match=RouteMatch(prefix=prefix),
        # No timeout: a generation may take an hour, and its client says when it has waited enough.
        route=RouteAction(cluster=cluster, timeout=pack.seconds(0), retry_policy=retry_policy),
        request_body_buffer_limit=buffer_bytes,
    )


def _unknown(rest_prefix: str, cluster: str, limits: Limits) -> Iterable[Route]:
    """Yields the routes of REST paths before transcoding, and the 404 of everything else (which the error filter
    shapes).

    The first one must name a cluster: a direct response has neither a body limit nor a CORS policy. Only a gRPC call
    to a path that is REST's gets as far as that cluster, which knows no such method.
    """
    yield _forward(rest_prefix, cluster, limits.upload_bytes)
    yield Route(
        match=RouteMatch(prefix="/"),
        direct_response=DirectResponseAction(status=404, body=DataSource(inline_string="no such path or method")),
    )


def _unpicked(route: Route) -> Route:
    route.typed_per_filter_config[PICKER_FILTER] = _pack_disabled()
    return route


def _pack_disabled() -> Any:
    disabled: betterproto2.Message = ExtProcPerRoute(disabled=True)
    return Any.pack(disabled)


def _nameless(service: str, limits: Limits) -> Route:
    """Returns the route of requests that name no model in header or metadata; ext_proc buffers their bodies from the
    start.

    A picker's `mode_override` says so too late: until then ext_proc lets the body pile up under a watermark, and where
    it reaches the route's limit before the picker's answer, Envoy stops reading and never begins again
    (Source: Envoy 1.40, ext_proc.cc, and envoyproxy/envoy pull request 39345, which mended the configured mode alone).
    """
    has_text = StringMatcher(safe_regex=RegexMatcher(regex=".+"))
    route = _grpc(service, clusters.REPLICAS, limits, retry_policy=_retries(limits))
    route.match = RouteMatch(
        prefix=f"/{service}/",
        headers=[
            HeaderMatcher(
                name=MODEL_HEADER, string_match=has_text, invert_match=True, treat_missing_header_as_empty=True
            )
        ],
        dynamic_metadata=[
            MetadataMatcher(
                filter=METADATA_NAMESPACE,
                path=[MetadataMatcherPathSegment(key=MODEL_KEY)],
                value=ValueMatcher(string_match=has_text),
                invert=True,
            )
        ],
    )
    mode = ProcessingMode(
        request_header_mode=ProcessingModeHeaderSendMode.SEND,
        response_header_mode=ProcessingModeHeaderSendMode.SKIP,
        request_body_mode=ProcessingModeBodySendMode.BUFFERED,
        response_body_mode=ProcessingModeBodySendMode.NONE,
    )
    buffered: betterproto2.Message = ExtProcPerRoute(overrides=ExtProcOverrides(processing_mode=mode))
    route.typed_per_filter_config[PICKER_FILTER] = Any.pack(buffered)
    return route


def _at_another_proxy() -> RetryPolicy:
    """Has a call that reached no proxy go to another one, where there is one: nothing was done yet."""
    predicate = RetryPolicyRetryHostPredicate(
        name="envoy.retry_host_predicates.previous_hosts", typed_config=Any.pack(PreviousHostsPredicate())
    )
    return RetryPolicy(
        retry_on="connect-failure,refused-stream,reset-before-request",
        num_retries=2,
        retry_host_predicate=[predicate],
        host_selection_retry_max_attempts=3,
    )


def _retries(limits: Limits) -> RetryPolicy:
    pause = RetryPolicyRetryBackOff(base_interval=pack.seconds(0.01), max_interval=pack.seconds(0.1))
    return RetryPolicy(retry_on=_RETRY_ON, num_retries=limits.retry_count, retry_back_off=pause)


def _any_origin() -> CorsPolicy:
    return CorsPolicy(
        allow_origin_string_match=[StringMatcher(safe_regex=RegexMatcher(regex=".*"))],
        allow_methods="GET, POST, OPTIONS",
        allow_headers=_CORS_REQUEST_HEADERS,
        expose_headers=_CORS_RESPONSE_HEADERS,
        max_age="7200",
        allow_credentials=False,
    )
