"""Which prompts lose what when the engine drops a block. Pure.

The engine knows blocks, those who send requests know prompts. A block's key stands for all tokens up to its end, so a
block that is dropped cuts every prompt that has it at the same place; what lies behind is of no use without it. Runs
in the engine's own process, where a step waits for it: a block of a new prompt costs one entry in a table, a block
that is dropped one look.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final

from helios.worker.replica.kv_losses import Loss

# A beginning that thousands have in common is told of the last few: a proxy looks at the last one that it sent, and
# there are not many proxies.
_MOST_PROMPTS_OF_A_BLOCK: Final = 16


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt, of which the first ``kept`` blocks were not dropped; ``count`` blocks name it."""

    request_id: str
    keys: Sequence[Hashable]
    token_count: int
    kept: int
    count: int = 0


class KeptPrompts:
    """The last prompts, by the keys of their blocks.

    Invariants: a block names at most the last ``most_prompts`` prompts that have it; there are at most ``most_blocks``
    blocks, or one prompt, and a prompt that is given up for that is told as lost; each prompt is named by at least one
    block.
    """

    def __init__(self, block_tokens: int, most_blocks: int, most_prompts: int = _MOST_PROMPTS_OF_A_BLOCK) -> None:
        """``most_blocks`` bounds the table; a block takes some 200 bytes."""
        self._block_tokens = block_tokens
        self._most_blocks = most_blocks
        self._most_prompts = most_prompts
        # By key, the prompts that have the block, all at the same place.
        self._blocks: dict[Hashable, list[_Prompt]] = {}
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()
        self._cut_prompts: dict[str, _Prompt] = {}

    def __len__(self) -> int:
        """Counts blocks."""
        return len(self._blocks)

    def begin(self, request_id: str, keys: Sequence[Hashable], token_count: int) -> None:
        """A request came whose prompt of ``token_count`` tokens has whole blocks with these keys, first to last.

        A request whose answers are several comes several times, with the same prompt.
        """
        if not keys:
            return
        known = self._prompts.get(request_id)
        if known is not None:
            if known.keys[-1] == keys[-1] and known.kept == len(known.keys):
                return
            self._forget(known)
        prompt = self._prompts[request_id] = _Prompt(request_id, keys, token_count, len(keys), len(keys))
        blocks = self._blocks
        for key in keys:
            prompts = blocks.get(key)
            if prompts is None:
                blocks[key] = [prompt]
                continue
            prompts.append(prompt)
            if len(prompts) > self._most_prompts:
                self._leave(prompts.pop(0))
        while len(blocks) > self._most_blocks and len(self._prompts) > 1:
            oldest = next(iter(self._prompts.values()))
            self._cut(oldest, 0)
            self._forget(oldest)

    def has(self, key: Hashable) -> bool:
        """Whether a prompt that is followed has the block."""
        return key in self._blocks

    def dropped(self, key: Hashable) -> None:
        """The engine dropped a block, and has no other one of the key."""
        for prompt in self._blocks.pop(key, ()):
            # Mostly the last one that was kept: an engine drops the end before the beginning.
            last = prompt.kept - 1
            if last >= 0:
                self._cut(prompt, last if prompt.keys[last] == key else prompt.keys.index(key))
            self._leave(prompt)

    def check(self, request_id: str, is_cached: Callable[[Hashable], bool]) -> None:
        """A request ended before its time: what was not computed of its prompt is no more cached than what was lost."""
        prompt = self._prompts.get(request_id)
        if prompt is not None:
            kept = next((position for position, key in enumerate(prompt.keys) if not is_cached(key)), len(prompt.keys))
            self._cut(prompt, kept)

    def clear(self) -> None:
        """The cache was emptied: whoever hears of it knows all that there is to know."""
        self._blocks.clear()
        self._prompts.clear()
        self._cut_prompts.clear()

    def take(self) -> list[Loss]:
        """Returns what was lost since the last call, of each prompt all that it lost."""
        if not self._cut_prompts:
            return []
        prompts, self._cut_prompts = self._cut_prompts.values(), {}
        size = self._block_tokens
        return [Loss(prompt.request_id, prompt.kept * size, prompt.token_count) for prompt in prompts]

    def _cut(self, prompt: _Prompt, position: int) -> None:
        if position < prompt.kept:
            prompt.kept = position
            self._cut_prompts[prompt.request_id] = prompt

    def _leave(self, prompt: _Prompt) -> None:
        prompt.count -= 1
        if not prompt.count and self._prompts.get(prompt.request_id) is prompt:
            del self._prompts[prompt.request_id]

    def _forget(self, prompt: _Prompt) -> None:
        """Follows a prompt no longer."""
        for key in prompt.keys:
            prompts = self._blocks.get(key)
            if prompts is not None and prompt in prompts:
                prompts.remove(prompt)
                if not prompts:
                    del self._blocks[key]
        self._prompts.pop(prompt.request_id, None)
