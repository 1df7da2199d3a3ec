"""Where compiled graphs and kernels are kept: a directory named by everything that they depend on.

Code that a compiler made for one model, set of flags, library version and machine is wrong for another, sometimes
silently (an instruction that the processor lacks). So the name is a digest of all of it, and a directory is used by any
number of replicas and never changed to mean something else. Pure, apart from making the directory.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

# Grows when the meaning of the key changes.
_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileInputs:
    """What compiled code depends on.

    Attributes:
        revision: Digest of the model's revision.
        flags: The engine's arguments that shape the graph; JSON values.
        engine_version: Of vLLM.
        torch_version: Of torch, with its build (`2.13.0+cpu`).
        driver: Version of the device's driver and of its runtime; empty on a CPU.
        architecture: What the code runs on: a GPU's name and capability, or a processor's instruction sets.
    """

    revision: str
    flags: Mapping[str, Any]
    engine_version: str
    torch_version: str
    driver: str
    architecture: str


def cache_key(inputs: CompileInputs) -> str:
    """Returns the name of what was compiled for these inputs: 64 hexadecimal digits. The order of flags is nothing."""
    document = {"version": _VERSION, **asdict(inputs)}
    encoded = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(encoded.encode()).hexdigest()


def cache_directory(root: str, inputs: CompileInputs) -> Path:
    """Returns the directory for these inputs below ``root``, made where it is not there."""
    path = Path(root) / cache_key(inputs)
    path.mkdir(parents=True, exist_ok=True)
    return path


def processor_architecture(machine: str, processors: str) -> str:
    """Returns a processor's architecture and a digest of its instruction sets.

    Args:
        machine: Such as ``x86_64``.
        processors: Text of /proc/cpuinfo; empty where there is none.
    """
    lines = (line for line in processors.splitlines() if line.startswith(("flags", "Features")))
    sets = sorted(set(next(lines, "").partition(":")[2].split()))
    return f"{machine}-{hashlib.sha256(' '.join(sets).encode()).hexdigest()[:16]}"
