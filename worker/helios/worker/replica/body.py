"""Reading an OpenAI request body: strict JSON, one object, exactly one ``model``.

The endpoint picker routes on the ``model`` that Envoy lifted out of the same bytes. A body with two such keys could
be one model to Envoy and another to this parser, so it is refused rather than interpreted.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from helios.mesh.errors import InvalidRequest

# Every spelling of the key: JSON allows an escape for any character. Looking for it in the bytes keeps the usual case
# (one hit) at one pass of a regular expression over a body that may have 32 MiB.
_MODEL_KEY: Final = re.compile(rb'"(?:m|\\u006[dD])(?:o|\\u006[fF])(?:d|\\u0064)(?:e|\\u0065)(?:l|\\u006[cC])"\s*:')
_JSON_TYPE: Final = "application/json"


def parse_body(content_type: str, body: bytes) -> Mapping[str, Any]:
    """Returns the body's JSON object. Raises InvalidRequest for anything that is not one, naming what is wrong."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != _JSON_TYPE:
        raise InvalidRequest(
            f"the body's content type is {media_type or 'missing'}; it must be {_JSON_TYPE}",
            metadata={"content_type": media_type},
        )
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object")
    model = document.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model: required, the name of a model", metadata={"param": "model"})
    if _has_two_models(body):
        raise InvalidRequest(
            "the body has more than one `model` key", reason="DUPLICATE_MODEL", metadata={"param": "model"}
        )
    return document


def _has_two_models(body: bytes) -> bool:
    hits = _MODEL_KEY.finditer(body)
    if next(hits, None) is None or next(hits, None) is None:
        return False
    # Several hits may be keys of nested objects or parts of texts: only now the outermost object's keys are counted.
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        # The hook sees inner objects first, so the last call is for the outermost.
        nonlocal outermost
        outermost = pairs

    try:
        json.loads(body, object_pairs_hook=keep)
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    return sum(key == "model" for key, _ in outermost) > 1
