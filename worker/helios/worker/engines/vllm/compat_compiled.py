"""What makes code that vLLM compiled on one node code that another can use: the parts of ``compat`` about its cache.

vLLM names what it compiled by a hash of its whole configuration. Two things in it say where a replica runs and nothing
of what is compiled: the absolute path of the model, which is the storage agent's on each node, and Helios's own
settings of the worker (cores by number, a descriptor). As they are, no node would find what another one compiled, and
neither would a replica in another slot of the same node.

On a CPU stock vLLM writes such a cache and never reads it: torch hands back a plain function, vLLM asks it for
``finalize_loading``, and what it takes for damage is compiled again, at every start.
"""

import copy
import functools
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform

from helios.worker.engines.vllm.compat_version import is_pinned
from helios.worker.replica.compile_cache import processor_architecture

SETTINGS_KEY: Final = "helios"
"""Of AsyncEngineArgs.additional_config, vLLM's own place for settings of extensions."""

_originals: dict[str, Callable[..., Any]] = {}


def compile_surroundings() -> dict[str, str]:
    """Returns what compiled code depends on beside the model, as CompileInputs has it."""
    versions = {
        "engine_version": vllm.__version__,
        "torch_version": torch.__version__,
        # vLLM compares what it traced with the sources at the same absolute paths.
        "engine_path": str(Path(vllm.__file__).parent),
    }
    if current_platform.is_cpu():
        processors = Path("/proc/cpuinfo")
        text = processors.read_text(encoding="utf-8", errors="replace") if processors.exists() else ""
        return versions | {"driver": "", "architecture": processor_architecture(platform.machine(), text)}
    capability = current_platform.get_device_capability()
    name = f"{current_platform.get_device_name()}-{capability.as_version_str() if capability else ''}"
    return versions | {"driver": f"{torch.version.cuda}-{_driver_version()}", "architecture": name}


def keep_compiled(directory: Path) -> None:
    """Has vLLM keep what it compiles in ``directory``. Call before an engine is made, in the process that makes it."""
    os.environ["VLLM_CACHE_ROOT"] = str(directory)  # noqa: TID251  the only way to tell all of vLLM's processes


def share_compiled(revisions: Mapping[str, str]) -> None:
    """Has vLLM name compiled code by what it was made from. Call before an engine is made, where it is made.

    Args:
        revisions: Digests of revisions by the path of the model directory that holds them.
    """
    if not is_pinned():
        return
    _keep(ModelConfig, "compute_hash", functools.partial(_hash_model, revisions))
    _keep(VllmConfig, "compute_hash", _hash_config)
    _keep(torch.compiler, "load_compiled_function", _load_compiled)


def _driver_version() -> str:
    # Not torch: asking it for a device would make a CUDA context, which no fork survives.
    version = Path("/sys/module/nvidia/version")
    return version.read_text(encoding="ascii").strip() if version.exists() else ""


def _hash_model(revisions: Mapping[str, str], original: Callable[..., str], config: Any) -> str:
    # A copy: other threads of the start read the path meanwhile.
    named = copy.copy(config)
    named.model = revisions.get(config.model, config.model)
    return original(named)


def _hash_config(original: Callable[..., str], config: Any, *args: Any, **kwargs: Any) -> str:
    settings = config.additional_config
    if isinstance(settings, dict) and SETTINGS_KEY in settings:
        # How many, because compiled loops are cut for that many threads.
        config = copy.copy(config)
        config.additional_config = settings | {SETTINGS_KEY: len(settings[SETTINGS_KEY]["cores"])}
    return original(config, *args, **kwargs)


def _load_compiled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    loaded = original(*args, **kwargs)
    compiled = loaded._artifacts.compiled_fn
    if not hasattr(compiled, "finalize_loading"):
        # It is whole when torch returns it: there is nothing of vLLM's in it that would have to be made.
        compiled.finalize_loading = lambda _config: None
    return loaded


def _keep(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replaces a function by one that gets it as its first argument. Again replaces the replacement."""
    key = f"{owner.__name__}.{name}"
    original = _originals.setdefault(key, getattr(owner, name))

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, name, replaced)
