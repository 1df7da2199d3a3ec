"""The HTTP filters, in the order in which a request meets them (a response meets them in reverse)."""

import re
from collections.abc import Iterable
from importlib import resources

from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutationRules
from envoy_data_plane.envoy.config.core.v3 import (
    AggregatedConfigSource,
    ApiVersion,
    BackoffStrategy,
    ConfigSource,
    DataSource,
    ExtensionConfigSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    RetryPolicy,
    RetryPolicyRetryHostPredicate,
)
from envoy_data_plane.envoy.config.rbac.v3 import Permission, Policy, Principal, PrincipalSet, RbacAction
from envoy_data_plane.envoy.config.rbac.v3 import Rbac as RbacRules
from envoy_data_plane.envoy.config.route.v3 import HeaderMatcher
from envoy_data_plane.envoy.extensions.filters.http.api_key_auth.v3 import (
    ApiKeyAuth,
    Credential,
    Forwarding,
    KeySource,
)
from envoy_data_plane.envoy.extensions.filters.http.composite.v3 import Composite
from envoy_data_plane.envoy.extensions.filters.http.cors.v3 import Cors
from envoy_data_plane.envoy.extensions.filters.http.ext_authz.v3 import BufferSettings, ExtAuthz
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    HeaderForwardingRules,
    MetadataOptions,
    MetadataOptionsMetadataNamespaces,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.grpc_json_transcoder.v3 import (
    GrpcJsonTranscoder,
    GrpcJsonTranscoderPrintOptions,
    GrpcJsonTranscoderRequestValidationOptions,
    GrpcJsonTranscoderUrlUnescapeSpec,
)
from envoy_data_plane.envoy.extensions.filters.http.health_check.v3 import HealthCheck
from envoy_data_plane.envoy.extensions.filters.http.json_to_metadata.v3 import (
    JsonToMetadata,
    JsonToMetadataKeyValuePair,
    JsonToMetadataMatchRules,
    JsonToMetadataRule,
    JsonToMetadataSelector,
)
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.envoy.extensions.filters.http.rbac.v3 import Rbac
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.type.matcher.v3 import ListStringMatcher, RegexMatcher, StringMatcher
from envoy_data_plane.envoy.type.v3 import HttpStatus, Percent, StatusCode
from envoy_data_plane.google.protobuf import Any

from helios.mesh.envoy import clusters, matching, pack, rest
from helios.mesh.envoy.headers import NODE_HEADER
from helios.mesh.envoy.routes import CORS_FILTER, OPENAI_SERVICE, PICKER_FILTER
from helios.mesh.envoy.settings import EdgeSettings, Limits
from helios.mesh.names import (
    ANSWER_FIELDS,
    BODY_BYTES_HEADER,
    COHORT_HEADER,
    ENDPOINT_HEADER,
    EXPRESS_FILTER,
    LANE_HEADER,
    MAX_RETRIES_HEADER,
    METADATA_NAMESPACE,
    MODEL_KEY,
    PICKER_HEADERS,
    REQUEST_ID_HEADER,
    ROUTE_REVISION_HEADER,
    SESSION_FIELDS,
    SESSION_HEADER,
    TIER_FIELD,
)

# The picker's own deadline ends a hold (503 with an estimate); Envoy's, a 504, is for a picker that hangs.
_PICKER_GRACE_SECONDS = 30.0
# How often the balancer is asked again where it named a picker that has failed: of two, it names the other one next.
_OTHER_HOST_TRIES = 3
# Bodies of up to 15,999 bytes. To send a longer one costs more than is well spent where its model has no use for it.
_SHORT_BODY_BYTES = "[0-9]{1,4}|1[0-5][0-9]{3}"
# Such a body in its frame; Envoy keeps so much at most for the question.
_CHECK_BYTES = 20_000
# A proxy answers in well below a millisecond, or can't: then the request waits in the picker's call instead.
_CHECK_SECONDS = 1.0
# Where Envoy keeps the path that the transcoder has rewritten.
_REST_PATH_HEADER = "x-envoy-original-path"
_CHECK = "envoy.filters.http.ext_authz"
_LUA = "envoy.filters.http.lua"
_PARSER = "envoy.filters.http.json_to_metadata"
_LIFT = "helios.lift"
_LIFTED = (MODEL_KEY, *SESSION_FIELDS, *ANSWER_FIELDS, TIER_FIELD)
_PICK = "helios.pick"
# Where the lane's picker asks how to pick.
_RENEW_PATH = "/helios.api.proxy.v1.LaneService/Renew"
_GRPC = r"application/grpc.*"
_JSON = r"(?i)application/json\s*(;.*)?"


def refusals(services: Iterable[str], limits: Limits) -> HttpFilter:
    """Refuses REST requests with a wrong method, a wrong content type, or a body that is too large.

    Lua is the dearest filter of a warm request, so an ordinary one does not meet it: JSON of a stated, middling size,
    posted to a path that takes it. Native gRPC has nothing to do with it.
    """
    ordinary = matching.all_of(
        (
            matching.request_header(":method", "POST"),
            matching.request_header(":path", "|".join(re.escape(path) for path in rest.posted_paths(services))),
            matching.request_header("content-type", r"(?i)application/json( *;.*)?"),
            matching.request_header("content-length", f"[0-9]{{1,{len(str(limits.max_body_bytes)) - 1}}}"),
            matching.is_not(matching.request_header("content-encoding", ".*")),
        )
    )
    native = matching.request_header("content-type", _GRPC)
    return matching.skipped_where(_LUA, _script(services, limits, "envoy_on_response"), (ordinary, native))


def error_shaping(services: Iterable[str], limits: Limits) -> HttpFilter:
    """Gives errors of REST callers OpenAI's form, and takes gRPC's headers off their answers.

    An answer that is no error and has none of these headers does not meet it, nor does native gRPC.
    """
    good = matching.all_of(
        (
            matching.response_header(":status", "[123].."),
            *(matching.is_not(matching.response_header(name, ".*")) for name in rest.NOT_FOR_REST),
        )
    )
    native = matching.response_header("content-type", _GRPC)
    return matching.skipped_where(_LUA, _script(services, limits, "envoy_on_request"), (good, native))


def _script(services: Iterable[str], limits: Limits, without: str) -> Lua:
    source = f"{rest.error_filter_source(services, limits.max_body_bytes)}\n{without} = nil\n"
    return Lua(default_source_code=DataSource(inline_string=source))


def healthz() -> HttpFilter:
    """Answers GET /healthz: 200 while a proxy is healthy, else 503."""
    path = HeaderMatcher(name=":path", string_match=StringMatcher(exact="/healthz"))
    check = HealthCheck(
        pass_through_mode=False,
        headers=[path],
        cluster_min_healthy_percentages={clusters.CONTROL: Percent(value=1.0)},
    )
    return pack.http_filter("envoy.filters.http.health_check", check)


def cors() -> HttpFilter:
    """Answers preflights; the policy is the virtual host's."""
    return pack.http_filter(CORS_FILTER, Cors())


def lift() -> tuple[HttpFilter, HttpFilter]:
    """Copies to metadata what the picker reads of a JSON body: the model, what bounds its answer, whose conversation it
    is of, how urgent it is. What is absent sets nothing.

    The first of them reads ordinary bodies (``lift.lua``); the second one parses those that it leaves alone, in C++,
    which took a quarter of Envoy's instructions for an express request of 1 kB.

    ``on_missing`` and ``on_error`` stay away on purpose: they also fire for gRPC requests and leave an empty model.
    """
    is_json = matching.request_header("content-type", _JSON)
    first = matching.taken(_LIFT, [(is_json, pack.extension(_LUA, reader()))])
    rules = JsonToMetadataMatchRules(
        rules=[
            JsonToMetadataRule(
                selectors=[JsonToMetadataSelector(key=key)],
                on_present=JsonToMetadataKeyValuePair(metadata_namespace=METADATA_NAMESPACE, key=key),
            )
            for key in _LIFTED
        ],
        allow_content_types_regex=RegexMatcher(regex=_JSON),
        allow_empty_content_type=True,
    )
    is_unread = matching.is_not(matching.has_metadata(METADATA_NAMESPACE, MODEL_KEY))
    parser = pack.extension(_PARSER, JsonToMetadata(request_rules=rules))
    return first, matching.taken(_PARSER, [(is_unread, parser)])


def reader() -> Lua:
    """Reads what is lifted of an ordinary JSON body (``lift.lua``), and leaves others alone."""
    wanted = ", ".join(f'"{name}"' for name in _LIFTED)
    constants = f'local METADATA_NAMESPACE = "{METADATA_NAMESPACE}"\nlocal WANTED = {{{wanted}}}\n'
    return _lua(constants, "lift")


def transcoder(services: Iterable[str], limits: Limits) -> HttpFilter:
    """Turns REST into gRPC and back, by the annotations in the descriptor set."""
    settings = GrpcJsonTranscoder(
        proto_descriptor=pack.absolute(rest.descriptor_path()),
        services=list(services),
        # Without it an error after early initial metadata becomes 200 with an empty stream.
        convert_grpc_status=True,
        max_request_body_size=limits.upload_bytes,
        request_validation_options=GrpcJsonTranscoderRequestValidationOptions(reject_unknown_method=True),
        # OpenAI ignores query parameters that it does not know, and clients send some (api-version, beta).
        ignore_unknown_query_parameters=True,
        # openai's client sends models.retrieve("org/name") with %2F.
        url_unescape_spec=GrpcJsonTranscoderUrlUnescapeSpec.ALL_CHARACTERS,
        print_options=GrpcJsonTranscoderPrintOptions(
            preserve_proto_field_names=True, always_print_primitive_fields=True, stream_sse_style_delimited=True
        ),
    )
    return pack.http_filter("envoy.filters.http.grpc_json_transcoder", settings)


def express() -> HttpFilter:
    """The express lane (``helios.mesh.xds.express``), which the proxies deliver; until they do, it does nothing."""
    nothing = matching.skipped_where(
        EXPRESS_FILTER, Composite(), (matching.request_header(":method", ".*"),)
    ).typed_config
    assert nothing is not None
    source = ExtensionConfigSource(
        config_source=ConfigSource(ads=AggregatedConfigSource(), resource_api_version=ApiVersion.V3),
        default_config=nothing,
        # The listener must not wait for a proxy.
        apply_default_config_without_warming=True,
        type_urls=[nothing.type_url],
    )
    return HttpFilter(name=EXPRESS_FILTER, config_discovery=source)


def pick(settings: EdgeSettings) -> HttpFilter:
    """Finds where a request goes at once, where that can be: in Envoy, for a model that the express lane has named, or
    by one question of a proxy. Otherwise the picker is asked (`picker`).

    One filter, since what has its endpoint already passes by each filter's conditions, which take Envoy microseconds.
    """
    is_asked = matching.all_of(
        (
            matching.request_header(_REST_PATH_HEADER, ".+"),
            matching.request_header(BODY_BYTES_HEADER, _SHORT_BODY_BYTES),
            matching.request_header(":path", f"/{re.escape(OPENAI_SERVICE)}/.*"),
        )
    )
    rows = [(is_asked, pack.extension(_CHECK, question(settings)))]
    if not settings.feeds:
        # With several proxies nobody is in the lane.
        rows.insert(0, (matching.request_header(LANE_HEADER, ".+"), pack.extension(_LUA, lane())))
    return matching.taken(_PICK, rows, unless=matching.request_header(ENDPOINT_HEADER, ".+"))


def lane() -> Lua:
    """Picks among a model's replicas (``lane.lua``). A request that it leaves alone is the picker's.

    Lua, since Envoy has it: a module in C would take less of the time, and a compiler wherever Helios is installed.
    """
    known = {
        "RENEW_PATH": _RENEW_PATH,
        "PICKER": clusters.PICKER,
        "LANE_HEADER": LANE_HEADER,
        "ENDPOINT_HEADER": ENDPOINT_HEADER,
        "ROUTE_REVISION_HEADER": ROUTE_REVISION_HEADER,
        "MAX_RETRIES_HEADER": MAX_RETRIES_HEADER,
        "COHORT_HEADER": COHORT_HEADER,
        "REQUEST_ID_HEADER": REQUEST_ID_HEADER,
        "SESSION_HEADER": SESSION_HEADER,
        "METADATA_NAMESPACE": METADATA_NAMESPACE,
    }
    constants = "".join(f'local {name} = "{value}"\n' for name, value in known.items())
    # What bounds one answer; the last field of the names is how many answers.
    for name, fields in (("SESSION_FIELDS", SESSION_FIELDS), ("BOUND_FIELDS", ANSWER_FIELDS[:-1])):
        constants += f"local {name} = {{" + ", ".join(f'"{field}"' for field in fields) + "}\n"
    return _lua(constants, "lane")


def _lua(constants: str, name: str) -> Lua:
    script = resources.files("helios.mesh.envoy").joinpath(f"{name}.lua").read_text(encoding="utf-8")
    source = DataSource(inline_string=constants + script)
    # No route goes by the headers that these scripts set.
    return Lua(default_source_code=source, stat_prefix=name, clear_route_cache=False)


def question(settings: EdgeSettings) -> ExtAuthz:
    """Asks a proxy where a REST request goes, in one message each way: its headers, the lifted model, and its body. A
    proxy that can't say so at once says nothing, and the picker is asked.

    Of native gRPC the picker is asked: its body has not come yet, which the transcoder has waited for, and whoever
    sends one is told what is wrong with its headers first.
    """
    service = GrpcService(
        envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=clusters.PICKER),
        timeout=pack.seconds(_CHECK_SECONDS),
        initial_metadata=[HeaderValue(key=NODE_HEADER, value=settings.node_id)],
    )
    return ExtAuthz(
        grpc_service=service,
        transport_api_version=ApiVersion.V3,
        with_request_body=BufferSettings(
            max_request_bytes=_CHECK_BYTES, allow_partial_message=True, pack_as_bytes=True
        ),
        # Where no proxy answers, the picker's call waits for one.
        failure_mode_allow=True,
        # The answer names the cluster of the proxy that picks, which the route goes by.
        clear_route_cache=bool(settings.feeds),
        metadata_context_namespaces=[METADATA_NAMESPACE],
        allowed_headers=_picker_headers(),
        decoder_header_mutation_rules=HeaderMutationRules(allow_envoy=True),
    )


def picker(settings: EdgeSettings) -> HttpFilter:
    """Talks with a proxy about where a request goes that has no endpoint yet (`express`, `pick`): it may have to wait,
    to be refused, or to show its body.
    """
    # Skipped, it would still be made for each request, which took 6 % of Envoy's instructions of an express one.
    is_open = matching.is_not(matching.request_header(ENDPOINT_HEADER, ".+"))
    return matching.taken(PICKER_FILTER, [(is_open, pack.extension(PICKER_FILTER, _processor(settings)))])


def _processor(settings: EdgeSettings) -> ExternalProcessor:
    service = GrpcService(
        envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=clusters.PICKER),
        initial_metadata=[HeaderValue(key=NODE_HEADER, value=settings.node_id)],
        # Here, not in envoy_grpc (which ignores it): with two proxies, the hold of a killed one moves to the other;
        # with one, requests wait for its restart, some nine seconds at most (pauses with full jitter). A proxy starts
        # in two seconds, and took seven beside sixteen runnable threads on two cores.
        retry_policy=RetryPolicy(
            retry_on="connect-failure,refused-stream,reset,unavailable,cancelled",
            num_retries=20,
            retry_back_off=BackoffStrategy(base_interval=pack.seconds(0.1), max_interval=pack.seconds(1)),
            retry_host_predicate=_other_hosts(settings),
            host_selection_retry_max_attempts=_OTHER_HOST_TRIES,
        ),
    )
    return ExternalProcessor(
        grpc_service=service,
        processing_mode=ProcessingMode(
            request_header_mode=ProcessingModeHeaderSendMode.SEND,
            response_header_mode=ProcessingModeHeaderSendMode.SKIP,
            request_body_mode=ProcessingModeBodySendMode.NONE,
            response_body_mode=ProcessingModeBodySendMode.NONE,
        ),
        message_timeout=pack.seconds(settings.limits.hold_limit_seconds + _PICKER_GRACE_SECONDS),
        # The default is 500, gRPC UNKNOWN.
        status_on_error=HttpStatus(code=StatusCode.ServiceUnavailable),
        metadata_options=MetadataOptions(
            forwarding_namespaces=MetadataOptionsMetadataNamespaces(untyped=[METADATA_NAMESPACE])
        ),
        # When the request began: a hold that moves to another picker must not begin anew.
        request_attributes=["request.time"],
        forward_rules=HeaderForwardingRules(allowed_headers=_picker_headers()),
        # x-envoy-max-retries = candidates - 1, so that the last failure is the replica's own.
        mutation_rules=HeaderMutationRules(allow_envoy=True),
        # The picker asks for the body where it wants it.
        allow_mode_override=True,
    )


def _picker_headers() -> ListStringMatcher:
    """What pickers are told of a request's headers: a client sends some twenty, cookies among them."""
    return ListStringMatcher(patterns=[StringMatcher(exact=name) for name in PICKER_HEADERS])


def _other_hosts(settings: EdgeSettings) -> list[RetryPolicyRetryHostPredicate]:
    """Has a call that failed at one of several pickers go to one that it has not been to."""
    if len(settings.picker) == 1:
        return []
    config = Any.pack(PreviousHostsPredicate())
    return [RetryPolicyRetryHostPredicate(name="envoy.retry_host_predicates.previous_hosts", typed_config=config)]


def router() -> HttpFilter:
    """Sends. ``suppress_envoy_headers``: x-envoy-* is nobody's business outside."""
    return pack.http_filter("envoy.filters.http.router", Router(suppress_envoy_headers=True))


def only_local_pages(host: str, port: int) -> HttpFilter:
    """Refuses (403) what a foreign web page could make a browser send to the admin listener.

    Host must be the listener's own or a loopback name with any port: a rebound DNS name is neither. An Origin, where
    there is one, must be the listener's own.
    """
    names = sorted({host, "127.0.0.1", "localhost", "::1"})
    pattern = "|".join(re.escape(f"[{name}]" if ":" in name else name) for name in names)
    is_own_host = _header(":authority", rf"(?i)({pattern})(:[0-9]{{1,5}})?")
    is_own_origin = _header("origin", rf"(?i)http://({pattern}):{port}")
    has_origin = Principal(header=HeaderMatcher(name="origin", present_match=True))
    origin_is_fine = Principal(or_ids=PrincipalSet(ids=[Principal(not_id=has_origin), is_own_origin]))
    policy = Policy(
        permissions=[Permission(any=True)],
        principals=[Principal(and_ids=PrincipalSet(ids=[is_own_host, origin_is_fine]))],
    )
    rules = RbacRules(action=RbacAction.ALLOW, policies={"local pages": policy})
    return pack.http_filter("envoy.filters.http.rbac", Rbac(rules=rules))


def bearer_token(token: str) -> HttpFilter:
    """Demands ``Authorization: Bearer <token>`` (401, gRPC UNAUTHENTICATED) and does not pass it on."""
    auth = ApiKeyAuth(
        credentials=[Credential(key=token, client="operator")],
        key_sources=[KeySource(header="authorization")],
        forwarding=Forwarding(hide_credentials=True),
    )
    return pack.http_filter("envoy.filters.http.api_key_auth", auth)


def _header(name: str, pattern: str) -> Principal:
    matcher = StringMatcher(safe_regex=RegexMatcher(regex=pattern))
    return Principal(header=HeaderMatcher(name=name, string_match=matcher))
