"""Pages of lists: their size, and the tokens that the next page is asked for with."""

import base64
import binascii
from typing import Final

from helios.mesh.errors import InvalidRequest

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1_000


def page_size(asked: int) -> int:
    """Returns how many are given: what was asked for, within bounds."""
    # A page may always be smaller than asked for. Source: https://google.aip.dev/158
    return min(asked, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE


def make_token(kind: str, position: str) -> str:
    """Returns an opaque token: callers that take it apart would tie us to its content."""
    return base64.urlsafe_b64encode(f"{kind}:{position}".encode()).decode()


def read_token(token: str, kind: str) -> str:
    """Returns the position of a token of this kind; empty for none. Raises InvalidRequest (INVALID_PAGE_TOKEN)."""
    if not token:
        return ""
    try:
        found, _, position = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition(":")
    except (binascii.Error, ValueError) as error:
        raise bad_token() from error
    if found != kind or not position:
        raise bad_token()
    return position


def read_number(token: str, kind: str) -> int | None:
    """Returns the number that is a token's position; None for no token. Raises InvalidRequest (INVALID_PAGE_TOKEN)."""
    position = read_token(token, kind)
    # 18 digits: an integer of SQL holds them.
    if position and not (position.isascii() and position.isdecimal() and len(position) <= 18):
        raise bad_token()
    return int(position) if position else None


def bad_token() -> InvalidRequest:
    """Returns the error of a token that was not given out."""
    return InvalidRequest(
        "page_token is not one that this call gave out", reason="INVALID_PAGE_TOKEN", metadata={"param": "page_token"}
    )
