"""The express lane as Envoy is told of it: which models it routes by itself, and where to.

It is one HTTP filter, delivered as an extension (ECDS), so that a new state of the lane is one resource, taken up and
acknowledged as a whole, and Envoy needs none to begin: its own configuration has a filter of the same name that does
nothing. Where a request is for one of the models, the filter sets the headers that the picker would have set; the
picker is left out of requests that have them (`helios.mesh.envoy.filters`). All of it is decided in C++.

What takes the lane is narrow on purpose; everything else asks the picker, as ever: JSON over REST to OpenAI's calls, of
a stated length below 100 kB, whose body names the model and whose headers name none, without one of our API keys and
without a word on durability or urgency. A client's own key, whatever it insists on sending, is no hindrance.

A model with several replicas is named to the filter behind this one, which picks among them
(`helios/mesh/envoy/lane.lua`).
"""

from collections.abc import Iterable
from typing import Any, Final

from envoy.config.core.v3 import base_pb2, extension_pb2
from envoy.extensions.common.matching.v3 import extension_matcher_pb2
from envoy.extensions.filters.common.matcher.action.v3 import skip_action_pb2
from envoy.extensions.filters.http.composite.v3 import composite_pb2
from envoy.extensions.filters.http.header_mutation.v3 import header_mutation_pb2
from envoy.extensions.matching.common_inputs.network.v3 import network_inputs_pb2
from envoy.extensions.matching.input_matchers.metadata.v3 import metadata_pb2
from envoy.type.matcher.v3 import http_inputs_pb2
from xds.core.v3 import extension_pb2 as xds_extension_pb2
from xds.type.matcher.v3 import matcher_pb2

from helios.mesh.names import (
    BODY_BYTES_HEADER,
    DURABLE_HEADER,
    ENDPOINT_HEADER,
    EXPRESS_FILTER,
    KEY_PREFIX,
    LANE_HEADER,
    MAX_RETRIES_HEADER,
    METADATA_NAMESPACE,
    MODEL_HEADER,
    MODEL_KEY,
    ROUTE_MODEL_HEADER,
    ROUTE_REVISION_HEADER,
    TIER_FIELD,
    TIER_HEADER,
)
from helios.mesh.xds.state import ExpressRoute

_PATHS: Final = "/helios.api.inference.v1.OpenAIService/"
_OVERWRITE: Final = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_Predicate = matcher_pb2.Matcher.MatcherList.Predicate


def express_filter(routes: Iterable[ExpressRoute]) -> Any:
    """Returns the lane's resource, a TypedExtensionConfig."""
    wrapped = extension_matcher_pb2.ExtensionWithMatcher()
    wrapped.extension_config.CopyFrom(_extension("envoy.filters.http.composite", composite_pb2.Composite()))
    models = matcher_pb2.Matcher()
    for route in sorted(routes, key=lambda route: route.name):
        row = models.matcher_list.matchers.add(predicate=_names(route.name))
        row.on_match.action.CopyFrom(_xds_extension("express", _mutation(route)))
    if not models.matcher_list.matchers:
        # A list has to have something: here, that nothing is done.
        row = models.matcher_list.matchers.add(predicate=_header(":path", ".*"))
        row.on_match.action.CopyFrom(_xds_extension("skip", skip_action_pb2.SkipFilter()))
    row = wrapped.xds_matcher.matcher_list.matchers.add(predicate=_ordinary())
    row.on_match.matcher.CopyFrom(models)
    return _extension(EXPRESS_FILTER, wrapped)


def _ordinary() -> Any:
    """What every request of the lane is."""
    conditions = [
        _header(BODY_BYTES_HEADER, "[0-9]{1,5}"),
        _begins(":path", _PATHS),
        _not(_header("authorization", f"(?i).*{KEY_PREFIX}.*")),
        _not(_header(MODEL_HEADER, ".*")),
        _not(_header(DURABLE_HEADER, ".*")),
        _not(_header(TIER_HEADER, ".*")),
        _not(_lifted(TIER_FIELD, _anything())),
    ]
    return _Predicate(and_matcher=_Predicate.PredicateList(predicate=conditions))


def _names(model: str) -> Any:
    value = metadata_pb2.Metadata()
    value.value.string_match.exact = model
    return _lifted(MODEL_KEY, value)


def _anything() -> Any:
    value = metadata_pb2.Metadata()
    value.value.present_match = True
    return value


def _lifted(key: str, value: Any) -> Any:
    """Whether what was lifted from the body by this name is so."""
    lifted = network_inputs_pb2.DynamicMetadataInput(filter=METADATA_NAMESPACE)
    lifted.path.add(key=key)
    single = _Predicate.SinglePredicate(input=_xds_extension(key, lifted))
    single.custom_match.CopyFrom(_xds_extension("envoy.matching.matchers.metadata_matcher", value))
    return _Predicate(single_predicate=single)


def _begins(name: str, start: str) -> Any:
    single = _of_header(name)
    single.value_match.prefix = start
    return _Predicate(single_predicate=single)


def _of_header(name: str) -> Any:
    return _Predicate.SinglePredicate(
        input=_xds_extension("header", http_inputs_pb2.HttpRequestHeaderMatchInput(header_name=name))
    )


def _header(name: str, pattern: str) -> Any:
    single = _of_header(name)
    single.value_match.safe_regex.google_re2.SetInParent()
    single.value_match.safe_regex.regex = pattern
    return _Predicate(single_predicate=single)


def _not(predicate: Any) -> Any:
    return _Predicate(not_matcher=predicate)


def _mutation(route: ExpressRoute) -> Any:
    """What the picker says of a request, or which model is picked for, as a filter that is run."""
    mutation = header_mutation_pb2.HeaderMutation()
    headers = {ROUTE_MODEL_HEADER: route.name}
    if route.endpoint is None:
        headers[LANE_HEADER] = route.model
    else:
        headers[ENDPOINT_HEADER] = str(route.endpoint)
        headers[ROUTE_REVISION_HEADER] = route.revision
        # There is no other endpoint to try.
        headers[MAX_RETRIES_HEADER] = "0"
    for name, value in headers.items():
        option = mutation.mutations.request_mutations.add().append
        option.append_action = _OVERWRITE
        # Envoy's formatter reads percent signs.
        option.header.key, option.header.value = name, value.replace("%", "%%")
    action = composite_pb2.ExecuteFilterAction()
    action.typed_config.CopyFrom(_extension("envoy.filters.http.header_mutation", mutation))
    return action


def _extension(name: str, message: Any) -> Any:
    config = extension_pb2.TypedExtensionConfig(name=name)
    config.typed_config.Pack(message)
    return config


def _xds_extension(name: str, message: Any) -> Any:
    config = xds_extension_pb2.TypedExtensionConfig(name=name)
    config.typed_config.Pack(message)
    return config
