"""What compiled graphs and kernels depend on, which names the directory where they are kept (``artifact_directory``).

Code that a compiler made for one model, set of flags, library version and machine is wrong for another, sometimes
silently (an instruction that the processor lacks). So the name is a digest of all of it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

# Grows when the meaning of the key changes.
_VERSION: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileInputs:
    """What compiled code depends on.

    Attributes:
        revision: Digest of the model's revision.
        flags: The engine's arguments that shape the graph; JSON values.
        engine_version: Of vLLM.
        engine_path: Where it is installed: what was traced is known by the absolute paths of its sources.
        torch_version: Of torch, with its build (`2.13.0+cpu`).
        driver: Version of the device's driver and of its runtime; empty on a CPU.
        architecture: What the code runs on: a GPU's name and capability, or a processor's instruction sets.
        thread_count: How many threads each rank computes with: loops are cut for so many.
    """

    revision: str
    flags: Mapping[str, Any]
    engine_version: str
    engine_path: str
    torch_version: str
    driver: str
    architecture: str
    thread_count: int


def inputs_document(inputs: CompileInputs) -> str:
    """Returns all inputs as JSON, the same text for the same inputs: what people read, and what the key is made of."""
    document = {"version": _VERSION, **asdict(inputs)}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def cache_key(inputs: CompileInputs) -> str:
    """Returns the name of what was compiled for these inputs: 64 hexadecimal digits. The order of flags is nothing."""
    return hashlib.sha256(inputs_document(inputs).encode()).hexdigest()


def processor_architecture(machine: str, processors: str) -> str:
    """Returns a processor's architecture and a digest of its instruction sets.

    Args:
        machine: Such as ``x86_64``.
        processors: Text of /proc/cpuinfo; empty where there is none.
    """
    lines = (line for line in processors.splitlines() if line.startswith(("flags", "Features")))
    sets = sorted(set(next(lines, "").partition(":")[2].split()))
    return f"{machine}-{hashlib.sha256(' '.join(sets).encode()).hexdigest()[:16]}"
