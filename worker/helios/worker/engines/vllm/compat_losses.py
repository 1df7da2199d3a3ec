"""What the engine drops of prompts, from vLLM's own KV events: the part of ``compat`` that runs in EngineCore's step.

vLLM publishes its events over a socket of TCP for whoever subscribes, each with all of a block's tokens. Here they are
looked at where they are made, and only what concerns a prompt leaves the process, as a few bytes. The name of a request
comes with it as vLLM's ``session_id``, which nothing but these events has a use for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import vllm.envs
import vllm.v1.engine.core
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, EventPublisher
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.kv_cache_interface import KVCacheSpecKind, get_kv_cache_spec_kind

from helios.worker.engines.vllm.kept_prompts import KeptPrompts
from helios.worker.replica.loss_pipe import LossWriter

# Groups of layers that need every block of a prompt. What another kind drops may be of no use any more.
_WHOLE_PROMPT: Final = frozenset(
    {KVCacheSpecKind.FULL_ATTENTION, KVCacheSpecKind.MLA_ATTENTION, KVCacheSpecKind.SINK_FULL_ATTENTION}
)


@contextmanager
def telling(config: Any, writer: LossWriter | None) -> Iterator[None]:
    """Has an EngineCore that is forked meanwhile tell what its KV cache loses; changes ``config`` for that.

    Not where blocks are not kept for other prompts, and not where blocks that leave the device go to a tier below it.
    """
    transfer = config.kv_transfer_config
    is_tiered = transfer is not None and transfer.kv_connector == "OffloadingConnector"
    if writer is None or is_tiered or not config.cache_config.enable_prefix_caching:
        yield
        return
    config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    core: Any = vllm.v1.engine.core.EngineCoreProc
    original = core.__init__

    def start_and_follow(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        follow(self.scheduler, writer)

    core.__init__ = start_and_follow
    try:
        yield
    finally:
        core.__init__ = original


def follow(scheduler: Any, writer: LossWriter) -> None:
    """Has a scheduler that makes events tell of its prompts, before it is given the first one."""
    groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    kinds = [get_kv_cache_spec_kind(group.kv_cache_spec) for group in groups]
    number = next((number for number, kind in enumerate(kinds) if kind in _WHOLE_PROMPT), None)
    if number is None:
        return
    # Events then name blocks by the very bytes that requests have; read for each event, in this process alone.
    vllm.envs.VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES = False
    scheduler.kv_event_publisher = teller = LossTeller(scheduler, number, writer)
    scheduler.add_request = _before(teller.begin, scheduler.add_request)
    scheduler.finish_requests = _after(teller.finished, scheduler.finish_requests)
    scheduler.reset_prefix_cache = _after(teller.emptied, scheduler.reset_prefix_cache)
    writer.begin()


class LossTeller(EventPublisher):
    """Stands where vLLM's publisher of events would."""

    def __init__(self, scheduler: Any, group: int, writer: LossWriter) -> None:
        super().__init__()
        manager = scheduler.kv_cache_manager
        self._pool = manager.block_pool
        self._group = group
        self._block_tokens: int = manager.kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size
        # Those that are cached, and those of prompts that wait.
        self._prompts = KeptPrompts(self._block_tokens, 2 * self._pool.num_gpu_blocks)
        self._writer = writer

    def begin(self, request: Any) -> None:
        """A request came; one that nobody named is nobody's to hear of."""
        if request.session_id is None:
            return
        # Its own list grows with the answer.
        keys = resolve_block_hashes(request.block_hashes, self._pool.hash_block_size, self._block_tokens)
        self._prompts.begin(request.session_id, tuple(keys), request.num_prompt_tokens)

    def publish(self, events: Any) -> None:
        """Takes a step's events."""
        prompts = self._prompts
        for event in events.events:
            if type(event) is BlockRemoved and event.group_idx == self._group:
                for key in event.block_hashes:
                    # Two requests that computed the same at the same time have a block each.
                    if prompts.has(key) and not self._is_cached(key):
                        prompts.dropped(key)
        self._tell()

    def finished(self, requests: list[Any]) -> None:
        """Requests were ended from outside, perhaps before they began."""
        for request in requests:
            if request.session_id is not None:
                self._prompts.check(request.session_id, self._is_cached)
        self._tell()

    def emptied(self, is_emptied: bool) -> None:
        """The cache was to be emptied: for a sleep, or because weights changed."""
        if is_emptied:
            self._prompts.clear()
            self._writer.tell_emptied()

    def shutdown(self) -> None:
        """Nothing to end."""

    def _is_cached(self, key: Any) -> bool:
        return self._pool.get_cached_block(key, [self._group]) is not None

    def _tell(self) -> None:
        if losses := self._prompts.take():
            self._writer.tell(losses)


def _before(first: Callable[[Any], None], then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def both(argument: Any) -> Any:
        first(argument)
        return then(argument)

    return both


def _after(last: Callable[[Any], None], first: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        result = first(*args, **kwargs)
        last(result)
        return result

    return both
