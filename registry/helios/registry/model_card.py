"""The licence that a model card names: README.md begins with YAML between two lines of ``---``.

Only two plain scalars of it are of interest, so no YAML parser reads a stranger's file; a licence in another form (a
list, a block) is left unsaid rather than guessed.

Source: https://huggingface.co/docs/hub/model-cards; ModelScope's cards have the same form.
"""

import re
from typing import Final

CARD: Final = "README.md"
# Metadata stands at the beginning; the longest (lists of languages and evaluations) have some tens of kilobytes.
MAX_CARD_BYTES: Final = 256 << 10
_FRONT: Final = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_FIELD: Final = re.compile(r"^(license|license_name):[ \t]*(.*?)[ \t]*\r?$", re.MULTILINE)
_VALUE: Final = re.compile(r"[A-Za-z0-9][\w.+()/ -]{0,99}", re.ASCII)


def read_license(card: bytes) -> str:
    """Returns the licence that a card names, ``license_name`` where ``license`` is 'other'; empty: it names none."""
    front = _FRONT.match(card[:MAX_CARD_BYTES].decode("utf-8", "replace"))
    if front is None:
        return ""
    fields: dict[str, str] = {}
    for name, text in _FIELD.findall(front[1]):
        value = text.partition(" #")[0].strip().strip("'\"")
        if _VALUE.fullmatch(value):
            fields.setdefault(name, value)
    named = fields.get("license", "")
    return fields.get("license_name", named) if named in {"", "other"} else named
