"""The border to users' code: whatever it raises becomes an error that says where it came from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import structlog

from helios.mesh.errors import (
    Bug,
    DeadlineExceeded,
    HeliosError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    Unauthenticated,
    Unsupported,
)

log = structlog.get_logger()

# What LitServe's users raise to choose a status: starlette's HTTPException, known by its attributes.
_BY_STATUS: Final[Mapping[int, type[HeliosError]]] = {
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    429: QuotaExceeded,
    501: Unsupported,
    503: Overloaded,
    504: DeadlineExceeded,
}


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Runs the block as users' code; ``what`` names it, such as "predict".

    Raises:
        HeliosError: Whatever the block raised, unless it was one already.
    """
    try:
        yield
    except HeliosError:
        raise
    except Exception as error:  # users' code raises what it likes, and the caller is told
        raise error_of(what, error) from error


def error_of(what: str, error: Exception) -> HeliosError:
    """Returns what a caller is told of an exception of users' code."""
    status, detail = getattr(error, "status_code", None), getattr(error, "detail", None)
    if isinstance(status, int) and 400 <= status < 600:
        kind: Any = _BY_STATUS.get(status, InvalidRequest if status < 500 else Bug)
        failure: HeliosError = kind(str(detail or error))
        return failure
    log.warning("custom code failed", hook=what, exc_info=error)
    return Bug(f"{what} of the model's class raised {type(error).__name__}: {error}", reason="CUSTOM_CODE_FAILED")
