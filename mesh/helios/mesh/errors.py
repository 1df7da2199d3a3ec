"""The errors of Helios, classified by what the caller should do.

    HeliosError
    ├── InvalidRequest               change the request
    │   ├── ContextLengthExceeded
    │   └── ModelMismatch
    ├── Unauthenticated              say who you are
    ├── PermissionDenied             ask somebody who may
    ├── NotFound                     name something else
    │   ├── ModelNotFound
    │   ├── RevisionNotFound
    │   └── BlobNotFound
    ├── Conflict                     look again, then decide
    │   └── AlreadyExists
    ├── PreconditionFailed           bring it into the right state first
    ├── QuotaExceeded                wait, or get more
    │   └── DiskFull
    ├── Unavailable                  try again later
    │   ├── Overloaded
    │   ├── NoReadyReplica
    │   ├── HoldExpired
    │   ├── ReplicaLost
    │   └── Draining
    ├── DeadlineExceeded             give it more time
    ├── Corrupted                    bytes are not what they should be
    │   └── DigestMismatch
    ├── Unsupported                  not to be had here
    └── Bug                          tell us

Each class carries its mapping to gRPC, HTTP and OpenAI; ``helios.mesh.status`` is the only code that applies it. This
module imports no transport, so that pure modules may raise these errors.
"""

from collections.abc import Mapping
from typing import ClassVar


class HeliosError(Exception):
    """An error with a stable reason, a message for people, and every dynamic value in ``metadata``.

    Attributes:
        reason: UPPER_SNAKE, stable, for machines.
        message: For people; says what to do where that is not obvious.
        metadata: Dynamic values as strings. ``param`` names the offending field of a request.
        retry_after_seconds: When a retry may succeed; None where the server does not know.
    """

    default_reason: ClassVar[str] = "UNKNOWN"
    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may succeed later without being changed."""
        return self.grpc_code in {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED"}


class InvalidRequest(HeliosError):
    """The request can never succeed as it is."""

    default_reason = "INVALID_REQUEST"
    grpc_code = "INVALID_ARGUMENT"
    http_status = 400
    openai_type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model's context."""

    default_reason = "CONTEXT_LENGTH_EXCEEDED"


class ModelMismatch(InvalidRequest):
    """Header and body, or body and replica, name different models."""

    default_reason = "MODEL_MISMATCH"


class Unauthenticated(HeliosError):
    """The caller did not show who it is."""

    default_reason = "UNAUTHENTICATED"
    grpc_code = "UNAUTHENTICATED"
    http_status = 401
    openai_type = "authentication_error"


class PermissionDenied(HeliosError):
    """The caller is known and may not do this."""

    default_reason = "PERMISSION_DENIED"
    grpc_code = "PERMISSION_DENIED"
    http_status = 403
    openai_type = "permission_error"


class NotFound(HeliosError):
    """The thing named does not exist."""

    default_reason = "NOT_FOUND"
    grpc_code = "NOT_FOUND"
    http_status = 404
    openai_type = "invalid_request_error"


class ModelNotFound(NotFound):
    """No model has this name or alias."""

    default_reason = "MODEL_NOT_FOUND"


class RevisionNotFound(NotFound):
    """No revision has this digest."""

    default_reason = "REVISION_NOT_FOUND"


class BlobNotFound(NotFound):
    """No blob has this digest."""

    default_reason = "BLOB_NOT_FOUND"


class Conflict(HeliosError):
    """The state changed under the caller."""

    default_reason = "CONFLICT"
    grpc_code = "ABORTED"
    http_status = 409
    openai_type = "conflict_error"


class AlreadyExists(Conflict):
    """The name is taken."""

    default_reason = "ALREADY_EXISTS"
    grpc_code = "ALREADY_EXISTS"


class PreconditionFailed(HeliosError):
    """The thing is in the wrong state for this."""

    default_reason = "PRECONDITION_FAILED"
    grpc_code = "FAILED_PRECONDITION"
    http_status = 400
    openai_type = "invalid_request_error"


class QuotaExceeded(HeliosError):
    """A limit of the caller, or a resource, is used up."""

    default_reason = "QUOTA_EXCEEDED"
    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429
    openai_type = "rate_limit_error"


class DiskFull(QuotaExceeded):
    """There is no room for the bytes."""

    default_reason = "DISK_FULL"


class Unavailable(HeliosError):
    """Not now; the same request may succeed later."""

    default_reason = "UNAVAILABLE"
    grpc_code = "UNAVAILABLE"
    http_status = 503


class Overloaded(Unavailable):
    """A queue is full."""

    default_reason = "OVERLOADED"


class NoReadyReplica(Unavailable):
    """No replica of the model can take the request."""

    default_reason = "NO_READY_REPLICA"


class HoldExpired(Unavailable):
    """The request was held for as long as it may be."""

    default_reason = "HOLD_EXPIRED"


class ReplicaLost(Unavailable):
    """The replica went away with the request."""

    default_reason = "REPLICA_LOST"


class Draining(Unavailable):
    """The server finishes what it has and takes nothing new."""

    default_reason = "DRAINING"


class DeadlineExceeded(HeliosError):
    """The time that the caller gave is over."""

    default_reason = "DEADLINE_EXCEEDED"
    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504
    openai_type = "timeout_error"


class Corrupted(HeliosError):
    """Bytes are not what they should be."""

    default_reason = "CORRUPTED"
    grpc_code = "DATA_LOSS"


class DigestMismatch(Corrupted):
    """Bytes do not have the digest that names them."""

    default_reason = "DIGEST_MISMATCH"


class Unsupported(HeliosError):
    """This can't be done here."""

    default_reason = "UNSUPPORTED"
    grpc_code = "UNIMPLEMENTED"
    http_status = 501


class Bug(HeliosError):
    """An invariant does not hold."""

    default_reason = "INTERNAL"
