"""The service tier in OpenAI's answers: what the endpoint picker gave a request that asked for one. Pure.

Engines leave the field empty, or out. Their answers are passed on as they are, so it is put in as bytes: in a JSON text
no key's own quotes stand within a string.
"""

from typing import Final

_EMPTY: Final = b'"service_tier":null'
_EVENT: Final = "data: "


def with_tier(body: bytes, tier: str) -> bytes:
    """Returns an answer with a tier; what is no JSON object stays as it is."""
    field = b'"service_tier":"%b"' % tier.encode()
    if _EMPTY in body:
        return body.replace(_EMPTY, field, 1)
    return b"{%b,%b" % (field, body[1:]) if body[:2] == b'{"' else body


def event_with_tier(event: str, tier: str) -> str:
    """Returns an event of a stream with a tier; the end of a stream has none."""
    if not event.startswith(_EVENT):
        return event
    return _EVENT + with_tier(event[len(_EVENT) :].encode(), tier).decode()
