"""The grammar of model names and aliases.

Names stand in URLs, headers, logs and file names of other components, so the alphabet is small and a part between two
slashes is never empty, ``.`` or ``..``. Names and aliases share one space: a name means one thing.
"""

import re
from typing import Final

from helios.mesh.errors import InvalidRequest

MAX_NAME_CHARS: Final = 200
# No model needs more; every alias is sent with its model to every watcher.
MAX_ALIASES: Final = 32
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*", re.ASCII)


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
