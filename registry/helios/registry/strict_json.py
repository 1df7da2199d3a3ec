"""JSON as safetensors headers and configs must be: one object, no duplicate keys, no NaN, no lone surrogates.

Python's parser takes the last of two equal keys, other parsers the first; a document that reads differently in two
programs can show one thing to the registry and another to the engine, so it is refused.
"""

import json
from typing import Any, NoReturn

from helios.mesh.errors import InvalidRequest


def parse_object(document: bytes, what: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        document: UTF-8 JSON.
        what: Name of the document for messages, such as ``config.json``.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, when it isn't one strict JSON object.
    """
    try:
        text = document.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        # Lone surrogates pass Python's parser and no other; they can't be encoded.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise malformed(f"{what} is not valid JSON: {str(error) or 'nested too deeply'}") from error
    if not isinstance(value, dict):
        raise malformed(f"{what} holds a JSON {type(value).__name__}, not an object")
    return value


def malformed(message: str) -> InvalidRequest:
    """Returns the error of a source whose content can't be used."""
    return InvalidRequest(message, reason="UNSUPPORTED_FORMAT", metadata={"param": "source"})


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:100]!r} stands twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
