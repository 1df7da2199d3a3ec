"""Filters that Envoy leaves out for what they have nothing to do for, decided by headers and metadata, in C++."""

from collections.abc import Iterable

import betterproto2
from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig as Extension
from envoy_data_plane.envoy.extensions.common.matching.v3 import ExtensionWithMatcher
from envoy_data_plane.envoy.extensions.filters.common.matcher.action.v3 import SkipFilter
from envoy_data_plane.envoy.extensions.filters.http.composite.v3 import Composite, ExecuteFilterAction
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.matching.common_inputs.network.v3 import (
    DynamicMetadataInput,
    DynamicMetadataInputPathSegment,
)
from envoy_data_plane.envoy.extensions.matching.input_matchers.metadata.v3 import Metadata
from envoy_data_plane.envoy.type.matcher.v3 import (
    HttpRequestHeaderMatchInput,
    HttpResponseHeaderMatchInput,
    ValueMatcher,
)
from envoy_data_plane.xds.core.v3 import TypedExtensionConfig as XdsExtension
from envoy_data_plane.xds.type.matcher.v3 import (
    Matcher,
    MatcherMatcherList,
    MatcherMatcherListFieldMatcher,
    MatcherMatcherListPredicate,
    MatcherMatcherListPredicatePredicateList,
    MatcherMatcherListPredicateSinglePredicate,
    MatcherOnMatch,
    RegexMatcher,
    RegexMatcherGoogleRe2,
    StringMatcher,
)

from helios.mesh.envoy import pack

Condition = MatcherMatcherListPredicate


def request_header(name: str, pattern: str) -> Condition:
    """Whether a header of the request has a value that the regular expression fits as a whole."""
    return _fits(HttpRequestHeaderMatchInput(header_name=name), pattern)


def response_header(name: str, pattern: str) -> Condition:
    """The same of the response."""
    return _fits(HttpResponseHeaderMatchInput(header_name=name), pattern)


def has_metadata(namespace: str, key: str) -> Condition:
    """Whether a filter before has set this."""
    single = MatcherMatcherListPredicateSinglePredicate(
        input=_extension(
            "metadata", DynamicMetadataInput(filter=namespace, path=[DynamicMetadataInputPathSegment(key=key)])
        ),
        custom_match=_extension(
            "envoy.matching.matchers.metadata_matcher", Metadata(value=ValueMatcher(present_match=True))
        ),
    )
    return Condition(single_predicate=single)


def all_of(conditions: Iterable[Condition]) -> Condition:
    """Two conditions or more at once."""
    return Condition(and_matcher=MatcherMatcherListPredicatePredicateList(predicate=list(conditions)))


def is_not(condition: Condition) -> Condition:
    """The opposite; a header that is absent fits nothing."""
    return Condition(not_matcher=condition)


def skipped_where(filter_name: str, message: betterproto2.Message, conditions: Iterable[Condition]) -> HttpFilter:
    """Returns a filter that does not see a request or response to which one of the conditions applies.

    It is there for each, though, and some cost while they do nothing (`taken`). Conditions of one filter are all of the
    request or all of the response.
    """
    rows = [MatcherMatcherListFieldMatcher(predicate=condition, on_match=_SKIP) for condition in conditions]
    return _matched(filter_name, rows, pack.extension(filter_name, message))


def taken(name: str, rows: Iterable[tuple[Condition, Extension]], *, unless: Condition | None = None) -> HttpFilter:
    """Returns a filter that is the first one whose condition applies; none where none does, or where ``unless`` does.

    Only that one is made. Conditions are of the request.
    """
    matchers = [] if unless is None else [MatcherMatcherListFieldMatcher(predicate=unless, on_match=_SKIP)]
    for condition, extension in rows:
        action = MatcherOnMatch(action=_extension("taken", ExecuteFilterAction(typed_config=extension)))
        matchers.append(MatcherMatcherListFieldMatcher(predicate=condition, on_match=action))
    return _matched(name, matchers, pack.extension("envoy.filters.http.composite", Composite()))


def _matched(name: str, rows: list[MatcherMatcherListFieldMatcher], extension: Extension) -> HttpFilter:
    matcher = Matcher(matcher_list=MatcherMatcherList(matchers=rows))
    return pack.http_filter(name, ExtensionWithMatcher(xds_matcher=matcher, extension_config=extension))


def _fits(message: betterproto2.Message, pattern: str) -> Condition:
    value = StringMatcher(safe_regex=RegexMatcher(google_re2=RegexMatcherGoogleRe2(), regex=pattern))
    single = MatcherMatcherListPredicateSinglePredicate(input=_extension("header", message), value_match=value)
    return Condition(single_predicate=single)


def _extension(name: str, message: betterproto2.Message) -> XdsExtension:
    packed: Extension = pack.extension(name, message)
    return XdsExtension(name=packed.name, typed_config=packed.typed_config)


_SKIP = MatcherOnMatch(action=_extension("skip", SkipFilter()))
