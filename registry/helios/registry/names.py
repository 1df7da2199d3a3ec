"""The grammar of model names and aliases.

Names stand in URLs, headers, logs and file names of other components, so the alphabet is small and a part between two
slashes is never empty, ``.`` or ``..``. Names and aliases share one space: a name means one thing.

A *reference* is a name or alias, and after an ``@`` which of the model's revisions is meant: a tag (``org/m@prod``), or
six or more digits that its digest begins with (``m@sha256:1f0c22``, ``m@1f0c22``). A tag never looks like digits.
"""

import re
from dataclasses import dataclass
from typing import Final

from helios.mesh.errors import InvalidRequest

MAX_NAME_CHARS: Final = 200
# No model needs more; every alias is sent with its model to every watcher.
MAX_ALIASES: Final = 32
# As in OCI registries, but for the length: a name and its tag stand in headers together.
MAX_TAG_CHARS: Final = 63
MAX_TAGS: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*", re.ASCII)
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_DIGEST: Final = re.compile(r"(sha256:)?([0-9a-f]{6,64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """A model, and which of its revisions: that of a tag, one by the beginning of its digest, or the served one.

    ``digest`` begins with ``sha256:`` and may end early.
    """

    name: str
    tag: str = ""
    digest: str = ""


def parse_reference(text: str, *, param: str = "model") -> Reference:
    """Reads a reference. Raises InvalidRequest (INVALID_MODEL_NAME, INVALID_TAG)."""
    name, mark, which = text.partition("@")
    check_name(name, param=param)
    digest = _DIGEST.fullmatch(which)
    if digest is not None:
        return Reference(name, digest=f"sha256:{digest[2]}")
    return Reference(name, tag=check_tag(which, param=param) if mark else "")


def parse_digest(text: str, *, param: str = "revision") -> str:
    """Returns the beginning of a digest in full, ``sha256:`` and six or more digits. Raises InvalidRequest."""
    found = _DIGEST.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f"{text[:100]!r} is not a revision: six or more lower-case hexadecimal digits, after 'sha256:' or alone",
            reason="INVALID_DIGEST",
            metadata={"param": param},
        )
    return f"sha256:{found[2]}"


def check_tag(tag: str, *, param: str = "tag") -> str:
    """Returns a tag if it follows the grammar.

    Args:
        tag: 1 to 63 characters of letters, digits, ``.``, ``_`` and ``-``, beginning with a letter or digit; not six or
            more hexadecimal digits alone, which would be the beginning of a revision's digest.
        param: The request's field, for the error.

    Raises:
        InvalidRequest: INVALID_TAG.
    """
    if not _TAG.fullmatch(tag) or len(tag) > MAX_TAG_CHARS:
        why = f"at most {MAX_TAG_CHARS} letters, digits, '.', '_' and '-', beginning with a letter or digit"
    elif _DIGEST.fullmatch(tag):
        why = "it reads like the beginning of a revision's digest"
    else:
        return tag
    raise InvalidRequest(f"{tag[:100]!r} is not a tag: {why}", reason="INVALID_TAG", metadata={"param": param})


def check_name(name: str, *, param: str = "name") -> str:
    """Returns a model's name or alias if it follows the grammar.

    Args:
        name: 1 to 200 characters of letters, digits, ``.``, ``_``, ``-`` and ``/``, beginning with a letter or digit.
        param: The request's field, for the error.

    Raises:
        InvalidRequest: INVALID_MODEL_NAME.
    """
    if len(name) > MAX_NAME_CHARS:
        raise _invalid(f"a model name has at most {MAX_NAME_CHARS} characters; this one has {len(name)}", param)
    if not _NAME.fullmatch(name):
        raise _invalid(
            f"{name!r} is not a model name: letters, digits, '.', '_', '-' and '/', beginning with a letter or digit",
            param,
        )
    if any(part in {"", ".", ".."} for part in name.split("/")):
        raise _invalid(f"{name!r} is not a model name: a part between slashes is empty, '.' or '..'", param)
    return name


def check_aliases(name: str, aliases: tuple[str, ...]) -> tuple[str, ...]:
    """Returns a model's new aliases, sorted and without duplicates.

    Raises:
        InvalidRequest: INVALID_MODEL_NAME where one breaks the grammar, is the model's own name, or there are too many.
    """
    if len(aliases) > MAX_ALIASES:
        raise _invalid(f"at most {MAX_ALIASES} aliases at once", "aliases")
    for alias in aliases:
        check_name(alias, param="aliases")
        if alias == name:
            raise _invalid(f"{alias!r} can't be an alias of itself", "aliases")
    return tuple(sorted(set(aliases)))


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_MODEL_NAME", metadata={"param": param})
