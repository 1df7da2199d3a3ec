"""How the engine's model classes can be split: what it asks of a class before it starts, as a table.

The registry has no engine to ask. The table is what the pinned version answers, written by
``python -m tests.worker.engines.splits`` and held to it by contracts; a class that it does not have is not split into
stages, because the engine would refuse to start.
"""

import importlib.resources
from dataclasses import dataclass
from functools import cache
from typing import Final

FILE: Final = "splits.txt"
_RANKS: Final = "ranks"
_STAGES: Final = "stages"


@dataclass(frozen=True, slots=True)
class Splits:
    """What a model class can do."""

    has_ranks: bool
    """Tensor parallelism: parts of each layer, as far as its shape lets them."""
    has_stages: bool
    """Pipeline parallelism: runs of layers."""


ANY_SPLIT: Final = Splits(has_ranks=True, has_stages=True)


def splits_of(architecture: str) -> Splits:
    """Returns how models of a class can be split."""
    return _table().get(architecture, Splits(has_ranks=True, has_stages=False))


def known_classes() -> frozenset[str]:
    """Returns the classes of the table."""
    return frozenset(_table())


@cache
def _table() -> dict[str, Splits]:
    text = (importlib.resources.files("helios.registry.profiles") / FILE).read_text()
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {name: Splits(has_ranks=_RANKS in words, has_stages=_STAGES in words) for name, *words in rows}
