"""The engines that there are, by name, and where each one's code is.

Imported by name: an engine's libraries are heavy, and only a launcher of that engine has them.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from helios.mesh.errors import InvalidRequest

# Option of the engine "custom" that names the user's class.
CLASS_OPTION: Final = "class"


@dataclass(frozen=True, slots=True)
class _Entry:
    """Attributes:
    module: Has ``preload()`` and ``build(spec, hooks)``.
    needs: Packages without which it can't run.
    """

    module: str
    needs: tuple[str, ...] = ()


_ENGINES: Final[Mapping[str, _Entry]] = {
    "vllm": _Entry("helios.worker.engines.vllm.factory", ("vllm",)),
    "transformers": _Entry("helios.worker.engines.transformers.factory", ("torch", "transformers")),
    "custom": _Entry("helios.worker.engines.custom.factory"),
    "simulated": _Entry("helios.worker.engines.simulated.factory"),
}


def engine_module(engine: str) -> Any:
    """Returns the factory module of an engine. Raises InvalidRequest for an unknown name."""
    if engine not in _ENGINES:
        known = ", ".join(_ENGINES)
        raise InvalidRequest(f"unknown engine {engine!r}; there is {known}", reason="UNKNOWN_ENGINE")
    return importlib.import_module(_ENGINES[engine].module)


def installed_engines() -> tuple[str, ...]:
    """Returns the engines whose packages are installed; looks for the packages, and imports none."""
    return tuple(name for name, entry in _ENGINES.items() if all(map(importlib.util.find_spec, entry.needs)))


def split_engine(engine: str) -> tuple[str, dict[str, str]]:
    """Splits an engine as people write it into its name and its options.

    ``custom:shouting:Shouting`` is the engine ``custom`` with the class ``shouting:Shouting``.
    """
    name, _, target = engine.partition(":")
    return name, {CLASS_OPTION: target} if target else {}
