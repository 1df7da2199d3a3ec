"""Which architectures the default engine can run, known before a byte of weights is fetched.

The registry has no engine, and no worker may have started yet, so the list is data: what the engine of the pinned
version answers, written by ``python -m tests.worker.engines.architectures`` and held to it by a contract test. A model
for another engine is not checked: ``transformers``, ``custom`` and ``simulated`` take what they take.
"""

import difflib
import importlib.resources
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from helios.mesh.errors import InvalidRequest
from helios.registry.profile import read_architecture

FILE: Final = "architectures.txt"


@cache
def known_architectures() -> frozenset[str]:
    """Returns the names of model classes that the engine runs."""
    text = (importlib.resources.files("helios.registry.sources") / FILE).read_text()
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def check_architecture(config: Mapping[str, Any], source: str, *, is_any: bool) -> None:
    """Checks that an engine knows the model.

    Args:
        config: Content of config.json.
        source: What the user named, for the message.
        is_any: The model is for an engine that has no list.

    Raises:
        InvalidRequest: UNSUPPORTED_ARCHITECTURE; UNSUPPORTED_FORMAT, where config.json names none.
    """
    name = read_architecture(config)
    if is_any or name in known_architectures():
        return
    why = f"{source} is a {name}, which the engine does not know"
    if config.get("auto_map"):
        why += "; it comes as Python code in its repository (auto_map), which is never run"
    elif close := difflib.get_close_matches(name, known_architectures(), n=3, cutoff=0.8):
        why += f"; it knows {', '.join(close)}"
    raise InvalidRequest(
        f"{why}. Nothing was fetched. For another engine say so: --set engine=transformers, or custom:…",
        reason="UNSUPPORTED_ARCHITECTURE",
        metadata={"param": "source", "architecture": name},
    )
