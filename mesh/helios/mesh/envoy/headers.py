"""What clients may not send.

``x-helios-*`` carries the mesh's own decisions (which endpoint, which revision) and ``x-envoy-*`` steers Envoy
(retries, timeouts, statistics): from a client both change nothing. They are removed by Envoy's early header
mutation, before the connection manager, the routes or a filter read any of them, on every route alike; a route's own
``request_headers_to_remove`` comes too late for that and would strip the picker's answer, too.
"""

import re
from collections.abc import Iterable

from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutation as Mutation
from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutationRemoveOnMatch as RemoveOnMatch
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    TypedExtensionConfig,
)
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import HeaderMutation
from envoy_data_plane.envoy.type.matcher.v3 import RegexMatcher, StringMatcher

from helios.mesh.envoy import pack
from helios.mesh.names import BODY_BYTES_HEADER, DURABLE_HEADER, MODEL_HEADER, kept_header

# Names this Envoy to the picker, which then knows whose acknowledgement of an endpoint it has to wait for.
NODE_HEADER = "x-helios-envoy"
CLIENT_REQUEST_ID_HEADER = "x-client-request-id"
OWN_PREFIX = "x-helios-"
# What clients may send of the mesh's own.
CLIENT_HEADERS = (MODEL_HEADER, DURABLE_HEADER)
AUTHORIZATION_HEADER = "authorization"


def strip_client_headers() -> TypedExtensionConfig:
    """Returns the early mutation of both listeners.

    A client's request id is kept as ``x-client-request-id`` (OpenAI's name for it; cut at 128 characters), where it
    sent none under that name; ``x-request-id`` is always Envoy's own, so that one id never names two requests.
    """
    kept_id = HeaderValueOption(
        header=HeaderValue(key=CLIENT_REQUEST_ID_HEADER, value="%REQ(x-request-id):128%"),
        append_action=HeaderValueOptionHeaderAppendAction.ADD_IF_ABSENT,
    )
    body_bytes = HeaderValueOption(
        header=HeaderValue(key=BODY_BYTES_HEADER, value="%REQ(content-length):20%"),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    mutations = [
        Mutation(append=kept_id),
        Mutation(remove="x-request-id"),
        _remove(StringMatcher(prefix="x-envoy-")),
        *(
            _remove(StringMatcher(safe_regex=RegexMatcher(regex=pattern)))
            for pattern in all_names_but(OWN_PREFIX, *CLIENT_HEADERS)
        ),
        # Only the error filter reads it, and only in responses; a client's would be echoed by nothing, and means
        # nothing.
        Mutation(remove="x-openai-error"),
        # The transcoder takes content-length off; the picker bounds what is held by it.
        Mutation(append=body_bytes),
    ]
    return pack.extension("helios.strip_client_headers", HeaderMutation(mutations=mutations))


def kept_for_answer(names: Iterable[str]) -> list[HeaderValueOption]:
    """Returns the additions to an answer of what the picker left for it with the request; see ``kept_header``.

    ext_proc could see the answer itself, for one more message each way and request.
    """
    overwrite = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    return [
        # An empty value, of a request without it, is not added: `keep_empty_value` is false.
        HeaderValueOption(header=HeaderValue(key=name, value=f"%REQ({kept_header(name)})%"), append_action=overwrite)
        for name in names
    ]


def all_names_but(prefix: str, *kept: str) -> list[str]:
    """Returns RE2 patterns for every name with the prefix except some; RE2 has no look-ahead.

    A name differs from a kept one because it ends early, because it has another character somewhere, or because it
    goes on. There is a pattern for each first character of theirs: Envoy takes none above 100 of RE2's instructions.
    """
    rests = {name.removeprefix(prefix) for name in kept}
    heads = sorted({rest[0] for rest in rests})
    start = re.escape(prefix)
    differing = [
        f"{start}{re.escape(head)}{_all_but({rest[1:] for rest in rests if rest[0] == head})}" for head in heads
    ]
    return [f"{start}([^{re.escape(''.join(heads))}].*)?", *differing]


def _all_but(texts: set[str]) -> str:
    heads = sorted({text[0] for text in texts if text})
    others = [f"[^{re.escape(''.join(heads))}].*"] if heads else [".+"]
    others += [re.escape(head) + _all_but({text[1:] for text in texts if text[:1] == head}) for head in heads]
    return f"({'|'.join(others)}){'' if '' in texts else '?'}"


def _remove(matcher: StringMatcher) -> Mutation:
    return Mutation(remove_on_match=RemoveOnMatch(key_matcher=matcher))
