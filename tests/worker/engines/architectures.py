"""Writes the registry's list of architectures: ``python -m tests.worker.engines.architectures``.

What vLLM's own registry names, and of what transformers names the classes that vLLM runs by other means: converted (a
classifier made of a language model) or through transformers' own code. Finding out the latter imports some hundred
modules, so the contract holds the list to the former and to transformers' names only.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[3]
FILE = ROOT / "registry" / "helios" / "registry" / "sources" / "architectures.txt"
# Encoders and other models without a head, which vLLM makes embeddings with where it knows their language model.
PLAIN = "MODEL_MAPPING_NAMES"
MAPPINGS = (
    PLAIN,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
)


def own_architectures() -> set[str]:
    """Returns what vLLM's registry names; the wrappers of transformers are no model's architecture."""
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415 - ten seconds

    return {name for name in ModelRegistry.get_supported_archs() if not name.startswith("Transformers")}


def transformers_names(mappings: Iterable[str] = MAPPINGS) -> set[str]:
    """Returns the classes that transformers names for text; importing none of them."""
    from transformers.models.auto import modeling_auto  # noqa: PLC0415 - torch

    found: set[str] = set()
    for mapping in mappings:
        for value in getattr(modeling_auto, mapping).values():
            found.update([value] if isinstance(value, str) else value)
    return found


def is_run(name: str, *, has_head: bool) -> bool:
    """Returns whether vLLM finds a way to run a class of transformers that it does not name itself."""
    import transformers  # noqa: PLC0415 - torch
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415 - ten seconds

    settings: Any = SimpleNamespace(runner_type="auto", convert_type="auto")
    if ModelRegistry._normalize_arch(name, settings) in ModelRegistry.models:
        return True
    if not has_head:
        return False
    try:
        model = getattr(transformers, name)
        return bool(model.is_backend_compatible() or model._can_set_attn_implementation())
    except (AttributeError, ImportError, RuntimeError, OSError):
        # A class whose own dependencies are not installed.
        return False


def main() -> None:
    import transformers  # noqa: PLC0415 - torch
    import vllm  # noqa: PLC0415 - ten seconds

    own = own_architectures()
    headed = transformers_names(set(MAPPINGS) - {PLAIN})
    others = {name for name in transformers_names() - own if is_run(name, has_head=name in headed)}
    head = f"# vLLM {vllm.__version__} with transformers {transformers.__version__}; written by {__spec__.name}"
    lines = [head, "# Its own", *sorted(own), "# By other means", *sorted(others)]
    FILE.write_text("\n".join(lines) + "\n")
    print(len(own), len(others))


if __name__ == "__main__":
    main()
