"""What a key is, how its secret is made and recognised, and what may be asked of a new one. Pure but for randomness.

A secret is 256 random bits, so its sha256 is as good a keeper as there is: nobody can guess 2^256 inputs, which is what
argon2 or bcrypt make slow for passwords, of which there are few. A slow hash would only cost each request
milliseconds of CPU, and give everybody who sends wrong keys a way to spend them.
"""

import enum
import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.mesh.names import KEY_PREFIX

_SECRET_BYTES: Final = 32
MAX_MODELS: Final = 64
MAX_WEIGHT: Final = 1000
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_GLOB: Final = re.compile(r"[!-~]{1,128}")


class Priority(enum.IntEnum):
    """Which requests go first where there is a queue: the higher ones."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What a key is to be; the contract's CreateKeyRequest says what the fields mean. Limits of 0 are none."""

    name: str
    tenant: str = ""
    models: tuple[str, ...] = ()
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    priority: Priority = Priority.NORMAL
    weight: int = 1
    ttl: timedelta | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret."""

    id: str
    name: str
    tenant: str
    models: tuple[str, ...]
    requests_per_minute: int
    tokens_per_minute: int
    priority: Priority
    weight: int
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def is_alive(self, now: datetime) -> bool:
        """Whether requests may use it."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key with what recognises it: the sha256 of its secret."""

    key: ApiKey
    sha256: bytes


def new_secret() -> str:
    """Returns a secret that nobody has."""
    # The prefix tells secret scanners, and people who find one, what it is.
    return KEY_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def hash_secret(secret: str) -> bytes:
    """Returns what recognises a secret."""
    return hashlib.sha256(secret.encode()).digest()


def key_of(spec: KeySpec, now: datetime) -> ApiKey:
    """Returns a new key of a spec. Raises InvalidRequest (INVALID_KEY)."""
    tenant = spec.tenant or spec.name
    for field, value in (("name", spec.name), ("tenant", tenant)):
        if _NAME.fullmatch(value) is None:
            raise _invalid(f"a {field} is 1 to 63 lower-case letters, digits and hyphens, not {value[:64]!r}", field)
    if len(spec.models) > MAX_MODELS or any(_GLOB.fullmatch(glob) is None for glob in spec.models):
        raise _invalid(f"at most {MAX_MODELS} globs of 1 to 128 printable characters say which models", "models")
    if not 0 <= spec.weight <= MAX_WEIGHT:
        raise _invalid(f"a weight is 1 to {MAX_WEIGHT}, not {spec.weight}", "weight")
    if spec.ttl is not None and spec.ttl <= timedelta():
        raise _invalid("a key lives for more than no time", "ttl")
    try:
        expires_at = now + spec.ttl if spec.ttl is not None else None
    except OverflowError as error:
        raise _invalid("a key ends before the year 10000", "ttl") from error
    return ApiKey(
        id=f"key-{secrets.token_hex(6)}",
        name=spec.name,
        tenant=tenant,
        models=spec.models,
        requests_per_minute=spec.requests_per_minute,
        tokens_per_minute=spec.tokens_per_minute,
        priority=spec.priority,
        weight=spec.weight or 1,
        created_at=now,
        expires_at=expires_at,
    )


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_KEY", metadata={"param": param})
