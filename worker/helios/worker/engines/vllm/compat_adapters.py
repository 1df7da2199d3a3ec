"""LoRA adapters that come and go while vLLM runs; a part of ``compat``.

vLLM's own list of adapters loads one more, or one in place of another, and forgets one by its name alone. What is
missing there: an adapter whose name was taken over by a new revision has to answer the requests that it has, with its
own weights, while the new one answers the others; and it may be dropped, and its files may go, only when the last of
them has ended, because the engine reads the files again whenever it had given an adapter's place to another one, and
dies where they are gone. So each loaded adapter has a name of its own in the engine (vLLM tells adapters apart by
name, in batches and in the prefix cache), and each request is counted.
"""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import vllm.lora.punica_wrapper.punica_cpu
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from helios.worker.engines.vllm import lora_kernels

# No name of a model or an adapter has it.
_SEPARATOR: Final = "#"
KERNELS: Final[Mapping[str, Callable[..., None]]] = {
    "bgmv_shrink": lora_kernels.shrink,
    "bgmv_expand": lora_kernels.expand,
    "bgmv_expand_slice": lora_kernels.expand_slice,
    "sgmv_shrink": lora_kernels.by_sequence(lora_kernels.shrink),
    "sgmv_expand": lora_kernels.by_sequence(lora_kernels.expand),
    "sgmv_expand_slice": lora_kernels.by_sequence(lora_kernels.expand_slice),
}
"""By vLLM's names of what they stand for."""


class AdapterTable:
    """Which adapters an engine has, and how many requests use each.

    Attributes:
        current: By the names that requests use; vLLM's serving code looks here.

    Invariant: an adapter that a request uses is in the engine, and its files are there.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._ids = itertools.count(1)
        self._known: set[int] = set()
        self._running: Counter[int] = Counter()
        self._ended = asyncio.Event()
        self.current: dict[str, LoRARequest] = {}

    async def load(self, name: str, path: str) -> LoRARequest:
        """Loads an adapter into all ranks and gives it the name. Raises whatever vLLM's client does."""
        number = next(self._ids)
        request = LoRARequest(lora_name=f"{name}{_SEPARATOR}{number}", lora_int_id=number, lora_path=path)
        await self._llm.add_lora(request)
        self._known.add(number)
        self.current[name] = request
        return request

    async def unload(self, name: str, request: LoRARequest) -> None:
        """Takes the name away, waits for the requests that use the adapter, and drops it from all ranks."""
        if self.current.get(name) is request:
            del self.current[name]
        while self._running[request.lora_int_id]:
            self._ended.clear()
            await self._ended.wait()
        self._known.discard(request.lora_int_id)
        del self._running[request.lora_int_id]
        await self._llm.remove_lora(request.lora_int_id)

    async def reload(self) -> None:
        """Fills the engine's buffers anew, which hold nothing after a sleep."""
        for request in list(self.current.values()):
            await self._llm.remove_lora(request.lora_int_id)
            await self._llm.add_lora(request)

    @contextmanager
    def use(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Counts a request by its arguments' ``lora_request`` for the block.

        One that was looked up just before its adapter was dropped gets the one that has the name now.

        Raises:
            VLLMNotFoundError: There is none.
        """
        request: LoRARequest | None = arguments.get("lora_request")
        if request is None:
            yield
            return
        if request.lora_int_id not in self._known:
            name = public_name(request)
            request = self.current.get(name)
            if request is None:
                raise VLLMNotFoundError(f"The model `{name}` does not exist.")
            arguments["lora_request"] = request
        self._running[request.lora_int_id] += 1
        try:
            yield
        finally:
            self._running[request.lora_int_id] -= 1
            self._ended.set()


class AdaptedModels(OpenAIServingModels):
    """vLLM's list of models, with the adapters of a table, shown by the names that requests use."""

    def __init__(self, llm: Any, base_model_paths: list[Any]) -> None:
        super().__init__(llm, base_model_paths)
        self.lora_requests = llm.adapters.current

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """Returns the name that an answer carries."""
        return super().model_name() if lora_request is None else public_name(lora_request)


def correct_kernels() -> None:
    """Replaces vLLM's products of adapters on a CPU. Call before an engine is made."""
    for name, kernel in KERNELS.items():
        setattr(vllm.lora.punica_wrapper.punica_cpu, name, kernel)


def public_name(request: LoRARequest) -> str:
    """Returns the name that requests use for an adapter."""
    return str(request.lora_name).rpartition(_SEPARATOR)[0]


def adapter_rank(path: str) -> int:
    """Returns an adapter's rank; 0 where its configuration does not say, which vLLM then says."""
    try:
        rank = json.loads(Path(path, "adapter_config.json").read_bytes()).get("r")
    except (OSError, ValueError, AttributeError):
        return 0
    return rank if isinstance(rank, int) else 0
