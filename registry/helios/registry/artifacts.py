"""What an artifact is, which ones are taken, and which go first. Pure.

An artifact's key is the sha256 of a document that says in clear all that it depends on. So a key can't claim to stand
for anything else than what people read beside it, and whoever looks for an artifact needs only what it would make it
from.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.registry.manifest import MEDIA_ARTIFACT, Manifest

# Flags and versions take one or two KiB; an artifact's document is sent with every list.
MAX_INPUTS_BYTES: Final = 64 << 10
MAX_PRODUCER_CHARS: Final = 200
# A thousand models with ten settings; what goes first is decided by looking at all of them.
MAX_COUNT: Final = 10_000
_KIND: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
_KEY: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact that is stored; the fields are the contract's."""

    kind: str
    key: str
    inputs: str
    revision: str
    digest: str
    size_bytes: int
    producer: str
    created_at: datetime
    used_at: datetime


@dataclass(frozen=True, slots=True)
class NewArtifact:
    """An artifact that is to be stored."""

    kind: str
    key: str
    inputs: str
    revision: str
    producer: str
    manifest: Manifest

    def check(self) -> "NewArtifact":
        """Returns itself. Raises InvalidRequest (INVALID_ARTIFACT) where it is not what its key says."""
        check_name(self.kind, self.key)
        encoded = self.inputs.encode()
        if len(encoded) > MAX_INPUTS_BYTES:
            raise _invalid(f"inputs take {len(encoded)} bytes, more than {MAX_INPUTS_BYTES}", "inputs")
        if hashlib.sha256(encoded).hexdigest() != self.key:
            raise _invalid("the key is not the sha256 of the inputs", "key")
        if not _is_object(self.inputs):
            raise _invalid("inputs are not a JSON object", "inputs")
        if len(self.producer) > MAX_PRODUCER_CHARS:
            raise _invalid(f"the producer's name has more than {MAX_PRODUCER_CHARS} characters", "producer")
        if any(entry.media_type != MEDIA_ARTIFACT for entry in self.manifest.entries):
            # A manifest that were a revision's too would be found under two meanings.
            raise _invalid(f"the files of an artifact have the media type {MEDIA_ARTIFACT}", "manifest")
        return self


@dataclass(frozen=True, slots=True)
class Use:
    """What an artifact takes, and when it was used last."""

    kind: str
    key: str
    size_bytes: int
    used_at: datetime


def check_name(kind: str, key: str) -> None:
    """Raises InvalidRequest (INVALID_ARTIFACT) where this names no artifact."""
    if not _KIND.fullmatch(kind):
        raise _invalid("a kind is 1 to 63 lower-case letters, digits and '-', beginning with a letter", "kind")
    if not _KEY.fullmatch(key):
        raise _invalid("a key is 64 lower-case hexadecimal digits", "key")


def plan_eviction(
    stored: Iterable[Use], *, needed_bytes: int, quota_bytes: int, max_count: int
) -> tuple[tuple[str, str], ...]:
    """Returns kind and key of what goes so that one of ``needed_bytes`` more fits: what was used longest ago first.

    Args:
        stored: All that there is.
        needed_bytes: At most the quota.
        quota_bytes: What all of them may take together.
        max_count: How many there may be; at least 1.
    """
    by_age = sorted(stored, key=lambda use: (use.used_at, use.kind, use.key))
    excess = sum(use.size_bytes for use in by_age) + needed_bytes - quota_bytes
    surplus = len(by_age) + 1 - max_count
    going: list[tuple[str, str]] = []
    for use in by_age:
        if excess <= 0 and len(going) >= surplus:
            break
        going.append((use.kind, use.key))
        excess -= use.size_bytes
    return tuple(going)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_ARTIFACT", metadata={"param": param})
