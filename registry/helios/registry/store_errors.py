"""What the errors of object stores mean to callers.

The libraries' texts quote requests, and with them signatures and tokens: only names and numbers go on from here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from obstore import exceptions

from helios.mesh.errors import Unavailable

# A store that fails now has been tried for the settings' time already.
_RETRY_SECONDS: Final = 10.0
_DENIED: Final = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)


class BlobStoreDenied(Unavailable):
    """The store refuses the registry's credentials: they are wrong, or have expired."""

    default_reason = "BLOB_STORE_DENIED"


def unavailable(what: str) -> Unavailable:
    """Says that the store failed."""
    return Unavailable(
        f"the blob store does not do what it is asked ({what})",
        reason="BLOB_STORE_UNAVAILABLE",
        retry_after_seconds=_RETRY_SECONDS,
        metadata={"cause": what},
    )


def denied(what: str) -> Unavailable:
    """Says that the store refused the credentials."""
    return BlobStoreDenied(
        f"the blob store refuses the registry's credentials ({what}): renew them, or allow reading, writing, listing"
        " and deleting below the prefix",
        metadata={"cause": what},
    )


@contextmanager
def mapped() -> Iterator[None]:
    """Raises obstore's errors as the mesh's; FileNotFoundError and AlreadyExistsError are the caller's to handle."""
    try:
        yield
    except (FileNotFoundError, exceptions.AlreadyExistsError):
        raise
    except _DENIED as error:
        raise denied(type(error).__name__) from None
    except exceptions.BaseError as error:
        raise unavailable(type(error).__name__) from None
