"""The part of ``compat`` that makes a start short: what vLLM does in every process, done once, later, or not at all.

Measured with SmolLM2-135M on two cores; each function says what it saves of a second and why nothing is lost. Called in
the launcher before any fork, so that every replica has it. Contract tests: ``tests/worker/engines/contracts.py``.
"""

import functools
import importlib.metadata
from typing import Any, Final

import numpy as np
import torch
import vllm.model_executor.layers.utils
import vllm.model_executor.layers.vocab_parallel_embedding
import vllm.model_executor.model_loader.utils
import vllm.plugins
import vllm.tokenizers.hf
import vllm.utils.cpu_resource_utils
import vllm.v1.sample.logits_processor
import vllm.v1.structured_output
import vllm.v1.worker.utils
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.v1.structured_output import StructuredOutputManager

PLUGIN_GROUPS: Final = (
    vllm.plugins.DEFAULT_PLUGINS_GROUP,
    vllm.plugins.STAT_LOGGER_PLUGINS_GROUP,
    vllm.v1.sample.logits_processor.LOGITSPROCS_GROUP,
)


@functools.cache
def apply(*, is_cpu: bool) -> None:
    """Applies all of it, once."""
    load_plugins_once()
    make_structured_output_tokenizer_late()
    if is_cpu:
        ask_for_processors_once()
        leave_memory_where_it_is()
        leave_kv_cache_untouched()
        pack_embeddings_when_multiplied()
        forget_reload_metadata()


def load_plugins_once() -> None:
    """Looks for plugins here, not in every process: scanning the installed packages takes 0.03 s each time."""
    original = importlib.metadata.entry_points
    found = {group: original(group=group) for group in PLUGIN_GROUPS}

    def entry_points(**wanted: Any) -> Any:
        return found[wanted["group"]] if [*wanted] == ["group"] and wanted["group"] in found else original(**wanted)

    # vLLM imports the function where it uses it, so that this reaches every use.
    setattr(importlib.metadata, "entry_points", entry_points)  # noqa: B010  a patch, and visibly one
    vllm.plugins.load_general_plugins()


def make_structured_output_tokenizer_late() -> None:
    """Has EngineCore load its tokenizer with the first request that needs a grammar (0.2 s of every start)."""
    make = vllm.v1.structured_output.cached_tokenizer_from_config

    class Late:
        """What the manager's constructor assigns is not there yet; who asks gets the real one."""

        def __get__(self, manager: Any, owner: type) -> Any:
            made = manager.__dict__.get("tokenizer")
            if made is None:
                made = manager.__dict__["tokenizer"] = make(model_config=manager.vllm_config.model_config)
            return made

        def __set__(self, manager: Any, value: Any) -> None:
            if value is not None:
                manager.__dict__["tokenizer"] = value

    setattr(StructuredOutputManager, "tokenizer", Late())  # noqa: B010
    setattr(vllm.v1.structured_output, "cached_tokenizer_from_config", lambda **_: None)  # noqa: B010


def leave_memory_where_it_is() -> None:
    """Moves no pages between memory nodes where the process has one: there is nothing to move.

    The kernel waits all the same, in `migrate_pages`, until each core has run a task of its own. Behind an engine that
    computes for another model that took from 0.3 s to the end of its request, half a minute.
    """
    if len(vllm.utils.cpu_resource_utils.get_memory_affinity()) == 1:
        setattr(torch.ops._C, "init_cpu_memory_env", lambda nodes: None)  # noqa: B010


def ask_for_processors_once() -> None:
    """Runs ``lscpu`` here; the list does not change, and a process of this size takes 0.01 s to start another."""
    module = vllm.utils.cpu_resource_utils
    processors = module._get_cpu_list()
    setattr(module, "_get_cpu_list", lambda: list(processors))  # noqa: B010


def leave_kv_cache_untouched() -> None:
    """Takes the KV cache as zero pages of the kernel, which exist from their first use on, rather than writing zeros.

    256 MiB take 0.04 to 0.2 s to write; memory that no request needs is never there at all.
    """

    def zeros(size: int, *, dtype: torch.dtype, device: Any) -> torch.Tensor:
        if torch.device(device).type != "cpu" or dtype is not torch.int8:
            return torch.zeros(size, dtype=dtype, device=device)
        # calloc of more than a few hundred KiB is a fresh mapping and writes nothing.
        return torch.from_numpy(np.zeros(size, dtype=np.int8))

    setattr(vllm.v1.worker.utils, "torch", _with(torch, zeros=zeros))  # noqa: B010


def pack_embeddings_when_multiplied() -> None:
    """Packs an input embedding for matrix products when there is one, which there hardly ever is.

    vLLM packs it like an output layer: 0.06 s, and a second copy of the largest tensor of a small model in memory.
    """
    original = UnquantizedEmbeddingMethod.process_weights_after_loading

    def process(self: Any, layer: Any) -> None:
        if isinstance(layer, ParallelLMHead):
            original(self, layer)
            return

        def first_product(x: Any, weight: Any, bias: Any) -> Any:
            original(self, layer)
            return layer.cpu_linear(x, weight, bias)

        layer.cpu_linear = first_product

    setattr(UnquantizedEmbeddingMethod, "process_weights_after_loading", process)  # noqa: B010


def forget_reload_metadata() -> None:
    """Leaves out the notes that loading new weights into a running engine needs; nobody does that on a CPU (0.03 s)."""
    setattr(vllm.model_executor.model_loader.utils, "record_metadata_for_reloading", lambda _: None)  # noqa: B010


def _with(module: Any, **replaced: Any) -> Any:
    """Returns something that looks like a module to those who only read its names."""

    class Replaced:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

    shown = Replaced()
    shown.__dict__.update(replaced)
    return shown
