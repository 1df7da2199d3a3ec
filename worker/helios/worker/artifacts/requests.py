"""What a replica says at the supervisor's door for artifacts."""

import hashlib
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.worker.line_door import decode_line, encode_line

COMPILE_CACHE: Final = "compile-cache"
"""Kind of what vLLM and torch keep of a compilation."""
PACKED_WEIGHTS: Final = "packed-weights"
"""Kind of weights as a processor computes with them, which replicas map."""


class Ask(StrEnum):
    """What a replica wants."""

    TAKE = "take"
    """Have it brought to the node; the answer says whether it is there."""
    PROVEN = "proven"
    """It was used by a replica that is ready and has answered a request: others may have it."""
    REFUSED = "refused"
    """No start with it went well: it is not wanted again."""


@dataclass(frozen=True, slots=True)
class ArtifactRequest:
    """An artifact, by all that it depends on (a JSON object), the revision it is of, and the replica that uses it.

    No replica, an empty id: it is for later ones, so that the end of none says anything of it.
    """

    kind: str
    inputs: str
    revision: str
    replica_id: str

    @property
    def key(self) -> str:
        """The artifact's key: 64 hexadecimal digits."""
        return hashlib.sha256(self.inputs.encode()).hexdigest()


def encode_request(ask: Ask, request: ArtifactRequest) -> bytes:
    """Returns the line that a replica sends."""
    return encode_line({"ask": ask, **asdict(request)})


def decode_request(line: bytes) -> tuple[Ask, ArtifactRequest]:
    """Reads what ``encode_request`` wrote. Raises InvalidRequest."""
    document = decode_line(line)
    try:
        ask = Ask(document.pop("ask", ""))
        request = ArtifactRequest(**document)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"not a request for an artifact: {error}") from error
    if not all(isinstance(value, str) for value in asdict(request).values()):
        raise InvalidRequest("the fields of a request for an artifact are text")
    return ask, request
