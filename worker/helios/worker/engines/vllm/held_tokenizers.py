"""Tokenizers that the launcher holds, so that a replica of a model that ran here before inherits its own by the fork.

Building one takes 0.25 s of CPU (49,152 tokens; more for larger vocabularies), the copy that vLLM keeps for its
rendering thread another 0.13 s, and both lie in a start's way on a busy machine. What is held is known by the files it
was made of: where one changed, the replica builds its own. Part of ``compat``: it replaces what vLLM does not promise
to keep.
"""

import copy
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import vllm.renderers.hf
import vllm.tokenizers.hf
import vllm.tokenizers.registry

_WEIGHTS: Final = (".safetensors", ".bin", ".gguf")
# vLLM makes one copy for each rendering thread and one more. It makes further ones when all are in use at once.
_COPIES: Final = 1

Key = tuple[Any, ...]
Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(slots=True)
class _Held:
    tokenizer: Any
    signature: Signature
    copies: list[Any] = field(default_factory=list)


class HeldTokenizers:
    """Stands for vLLM's ``cached_get_tokenizer``; at most ``capacity`` are held, the longest unused one goes first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._is_holding = False
        self._make: Callable[..., Any] = vllm.tokenizers.registry.cached_get_tokenizer

    def install(self) -> None:
        """Has vLLM ask here. Idempotent; called in the launcher."""
        if self.is_installed:
            return
        setattr(vllm.tokenizers.registry, "cached_get_tokenizer", self)  # noqa: B010  a patch, and visibly one
        _remember_vocabularies()
        _copy_with(self._take_copy)

    @property
    def is_installed(self) -> bool:
        """Whether vLLM asks here: what nobody asks for need not be held."""
        return getattr(vllm.tokenizers.registry, "cached_get_tokenizer", None) is self

    def holds(self, path: str) -> bool:
        """Whether the tokenizer of a model's directory is held, and its files are as they were."""
        held = [one for key, one in self._held.items() if key[0] == path]
        return bool(held) and held[-1].signature == _signature(path) and bool(held[-1].copies)

    def hold(self, model_config: Any) -> None:
        """Builds and keeps the tokenizer of a model, with the copy that a renderer needs."""
        self._is_holding = True
        try:
            vllm.tokenizers.registry.cached_tokenizer_from_config(model_config)
        finally:
            self._is_holding = False

    def __call__(self, path: Any, **arguments: Any) -> Any:
        """Returns the held tokenizer, or a new one where none is held or its files changed."""
        key = (str(path), *sorted(arguments.items()))
        signature = _signature(str(path))
        held = self._held.get(key)
        if held is not None and held.signature == signature:
            self._held.move_to_end(key)
            return held.tokenizer
        if not self._is_holding or not signature:
            return self._make(path, **arguments)
        tokenizer = vllm.tokenizers.registry.get_tokenizer(path, **arguments)
        copies = [copy.deepcopy(tokenizer) for _ in range(_COPIES)]
        self._held[key] = _Held(tokenizer, signature, copies)
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)
        return tokenizer

    def _take_copy(self, tokenizer: Any) -> Any:
        # Shallow copies share the object that does the work.
        core = getattr(tokenizer, "_tokenizer", None)
        for held in self._held.values():
            if core is not None and getattr(held.tokenizer, "_tokenizer", None) is core and held.copies:
                return held.copies.pop()
        return copy.deepcopy(tokenizer)


def _signature(path: str) -> Signature:
    """Returns what a directory's files are known by, weights left out; empty where it is not a directory."""
    try:
        entries = [entry for entry in os.scandir(path) if not entry.name.endswith(_WEIGHTS)]
        stats = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def _remember_vocabularies() -> None:
    """Has each tokenizer make its vocabulary once: vLLM's shallow copies make it anew, 0.02 s each."""
    original = vllm.tokenizers.hf.get_cached_tokenizer

    def cached(tokenizer: Any) -> Any:
        if "get_vocab" not in vars(tokenizer):
            vocabulary = tokenizer.get_vocab()
            tokenizer.get_vocab = lambda: vocabulary
        return original(tokenizer)

    setattr(vllm.tokenizers.hf, "get_cached_tokenizer", cached)  # noqa: B010


def _copy_with(deepcopy: Callable[[Any], Any]) -> None:
    """Has vLLM's pool of tokenizers make fewer copies, and by ``deepcopy``."""
    original = vllm.tokenizers.hf.maybe_make_thread_pool

    class Copying:
        """Stands for the module ``copy`` in vLLM's module."""

        copy = staticmethod(copy.copy)

    setattr(Copying, "deepcopy", staticmethod(deepcopy))  # noqa: B010
    setattr(vllm.tokenizers.hf, "copy", Copying)  # noqa: B010
    setattr(vllm.renderers.hf, "maybe_make_thread_pool", lambda tokenizer, _: original(tokenizer, _COPIES))  # noqa: B010
