"""What a proxy says where the registry can't be asked: the request may be fine, and whoever sent it, too."""

from typing import Final

from helios.mesh.errors import DeadlineExceeded, HeliosError, PermissionDenied, Unauthenticated, Unavailable

# The last two are said of this proxy's certificate, and would be read as said of the caller's key.
REGISTRY_AWAY: Final = (Unavailable, DeadlineExceeded, PermissionDenied, Unauthenticated)
_RETRY_AFTER_SECONDS: Final = 2.0


def registry_away(what: str, error: HeliosError, **metadata: str) -> Unavailable:
    """Returns what to raise for one of ``REGISTRY_AWAY``: that ``what``, for there is no registry, and why."""
    return Unavailable(
        f"{what}: the registry can't be asked ({error.message})",
        reason="REGISTRY_UNAVAILABLE",
        metadata=metadata,
        retry_after_seconds=_RETRY_AFTER_SECONDS,
    )
