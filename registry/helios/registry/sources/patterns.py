"""Which files of a source are wanted: patterns as the Hugging Face hub's own client takes them.

``*`` matches across ``/``; a pattern that ends with ``/`` means all below. A file is wanted if it matches one of
``include`` (all do where there is none) and none of ``exclude``.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from helios.mesh.errors import InvalidRequest

_MAX_PATTERNS: Final = 64
_MAX_PATTERN_CHARS: Final = 256


@dataclass(frozen=True, slots=True)
class Selection:
    """Patterns of files to take and to leave."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def check(self) -> "Selection":
        """Returns itself. Raises InvalidRequest (INVALID_PATTERN)."""
        for param, patterns in (("include", self.include), ("exclude", self.exclude)):
            if len(patterns) > _MAX_PATTERNS:
                raise _invalid(f"at most {_MAX_PATTERNS} patterns", param)
            for pattern in patterns:
                if not pattern or len(pattern) > _MAX_PATTERN_CHARS or not pattern.isprintable():
                    raise _invalid(f"{pattern[:100]!r} is not a pattern: 1 to {_MAX_PATTERN_CHARS} characters", param)
        return self

    def takes(self, path: str) -> bool:
        """Returns whether a file is wanted."""
        return (not self.include or _matches(path, self.include)) and not _matches(path, self.exclude)


ALL: Final = Selection()


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_PATTERN", metadata={"param": param})
