"""Filters that Envoy leaves out for what they have nothing to do for, decided by headers, in C++."""

from collections.abc import Iterable

import betterproto2
from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig as Extension
from envoy_data_plane.envoy.extensions.common.matching.v3 import ExtensionWithMatcher
from envoy_data_plane.envoy.extensions.filters.common.matcher.action.v3 import SkipFilter
from envoy_data_plane.envoy.extensions.filters.http.composite.v3 import Composite, ExecuteFilterAction
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.type.matcher.v3 import HttpRequestHeaderMatchInput, HttpResponseHeaderMatchInput
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


def all_of(conditions: Iterable[Condition]) -> Condition:
    """Two conditions or more at once."""
    return Condition(and_matcher=MatcherMatcherListPredicatePredicateList(predicate=list(conditions)))


def is_not(condition: Condition) -> Condition:
    """The opposite; a header that is absent fits nothing."""
    return Condition(not_matcher=condition)


def skipped_where(filter_name: str, message: betterproto2.Message, conditions: Iterable[Condition]) -> HttpFilter:
    """Returns a filter that neither sees nor costs a request or response to which one of the conditions applies.

    Conditions of one filter are all of the request or all of the response.
    """
    rows = [MatcherMatcherListFieldMatcher(predicate=condition, on_match=_SKIP) for condition in conditions]
    wrapped = ExtensionWithMatcher(
        xds_matcher=Matcher(matcher_list=MatcherMatcherList(matchers=rows)),
        extension_config=pack.extension(filter_name, message),
    )
    return pack.http_filter(filter_name, wrapped)


def taken(name: str, rows: Iterable[tuple[Condition, Extension]], *, unless: Condition) -> HttpFilter:
    """Returns a filter that is the first one whose condition applies; none where none does, or where ``unless`` does.

    Conditions are of the request.
    """
    matchers = [MatcherMatcherListFieldMatcher(predicate=unless, on_match=_SKIP)]
    for condition, extension in rows:
        action = MatcherOnMatch(action=_extension("taken", ExecuteFilterAction(typed_config=extension)))
        matchers.append(MatcherMatcherListFieldMatcher(predicate=condition, on_match=action))
    wrapped = ExtensionWithMatcher(
        xds_matcher=Matcher(matcher_list=MatcherMatcherList(matchers=matchers)),
        extension_config=pack.extension("envoy.filters.http.composite", Composite()),
    )
    return pack.http_filter(name, wrapped)


def _fits(message: betterproto2.Message, pattern: str) -> Condition:
    value = StringMatcher(safe_regex=RegexMatcher(google_re2=RegexMatcherGoogleRe2(), regex=pattern))
    single = MatcherMatcherListPredicateSinglePredicate(input=_extension("header", message), value_match=value)
    return Condition(single_predicate=single)


def _extension(name: str, message: betterproto2.Message) -> XdsExtension:
    packed: Extension = pack.extension(name, message)
    return XdsExtension(name=packed.name, typed_config=packed.typed_config)


_SKIP = MatcherOnMatch(action=_extension("skip", SkipFilter()))
