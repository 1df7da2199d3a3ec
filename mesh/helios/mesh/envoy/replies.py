"""Envoy's own replies, where the error filter does not see them or can't help.

An overloaded Envoy answers before any filter exists, and the status of a gRPC reply is set by the connection manager.
"""

from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLogFilter,
    AndFilter,
    ComparisonFilter,
    ComparisonFilterOp,
    ExtensionFilter,
    HeaderFilter,
    StatusCodeFilter,
)
from envoy_data_plane.envoy.config.core.v3 import (
    DataSource,
    HeaderValue,
    HeaderValueOption,
    RuntimeUInt32,
    SubstitutionFormatString,
)
from envoy_data_plane.envoy.config.route.v3 import HeaderMatcher
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    LocalReplyConfig,
    ResponseMapper,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

_OVERLOADED = (
    '{"error":{"message":"The gateway is out of memory for requests; try again.",'
    '"type":"server_error","param":null,"code":"overloaded"}}'
)


def own_replies() -> LocalReplyConfig:
    """Returns the replies that differ from Envoy's."""
    return LocalReplyConfig(mappers=[_too_large_for_grpc(), _overloaded_for_rest()])


def _too_large_for_grpc() -> ResponseMapper:
    """Says RESOURCE_EXHAUSTED, as the mesh's servers do; Envoy has no gRPC status for its own 413 and says UNKNOWN."""
    value = RuntimeUInt32(default_value=413, runtime_key="helios.status")
    is_413 = StatusCodeFilter(comparison=ComparisonFilter(op=ComparisonFilterOp.EQ, value=value))
    return ResponseMapper(
        filter=AccessLogFilter(status_code_filter=is_413), headers_to_add=[_header("grpc-status", "8")]
    )


def _overloaded_for_rest() -> ResponseMapper:
    # The reply carries no response flag; its details are what tells it from other 503s.
    by_details = ExpressionFilter(expression="response.code_details == 'overload'")
    is_overload = AccessLogFilter(
        extension_filter=ExtensionFilter(
            name="envoy.access_loggers.extension_filters.cel", typed_config=Any.pack(by_details)
        )
    )
    is_rest = HeaderMatcher(
        name="content-type",
        string_match=StringMatcher(prefix="application/grpc"),
        invert_match=True,
        treat_missing_header_as_empty=True,
    )
    both = AndFilter(filters=[is_overload, AccessLogFilter(header_filter=HeaderFilter(header=is_rest))])
    body = SubstitutionFormatString(
        text_format_source=DataSource(inline_string=_OVERLOADED), content_type="application/json"
    )
    return ResponseMapper(
        filter=AccessLogFilter(and_filter=both), body_format_override=body, headers_to_add=[_header("retry-after", "5")]
    )


def _header(name: str, value: str) -> HeaderValueOption:
    return HeaderValueOption(header=HeaderValue(key=name, value=value))
