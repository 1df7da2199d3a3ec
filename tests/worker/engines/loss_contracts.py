"""What Helios leans on in vLLM to hear what the KV cache loses; run with `contracts`.

vLLM's own cache manager, pool of blocks, requests and events, without weights and without a process of the engine.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import EventPublisher, KVEventBatch, NullEventPublisher
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from helios.worker.engines.vllm import compat, compat_losses
from helios.worker.replica.kv_losses import Loss, LossLog
from helios.worker.replica.loss_pipe import LossPipe
from tests.worker.engines.contracts import contract, parameters

BLOCK_TOKENS = 16
BLOCK_COUNT = 9
"""One of them is vLLM's own."""


class StandIn:
    """A scheduler as far as it has to do with blocks."""

    def __init__(self, spec: KVCacheSpec) -> None:
        init_none_hash(sha256)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        self.kv_cache_manager = KVCacheManager(
            KVCacheConfig(num_blocks=BLOCK_COUNT, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=1024,
            scheduler_block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS,
            enable_kv_cache_events=True,
        )
        self.kv_event_publisher: EventPublisher = NullEventPublisher()
        self.waiting: list[Request] = []

    def add_request(self, request: Request) -> None:
        self.waiting.append(request)

    def finish_requests(self, requests: list[Request], status: RequestStatus) -> list[Request]:
        for request in requests:
            request.status = status
            self.kv_cache_manager.free(request)
        return requests

    def reset_prefix_cache(self, *_: Any) -> bool:
        return bool(self.kv_cache_manager.reset_prefix_cache())

    def step(self, *, finishes: bool = True) -> None:
        """Computes all that waits, one after the other, unless each is to keep its blocks."""
        manager, computed = self.kv_cache_manager, list(self.waiting)
        self.waiting.clear()
        for request in computed:
            blocks, count, _ = manager.get_computed_blocks(request)
            assert manager.allocate_slots(request, request.num_tokens - count, count, blocks) is not None
            if finishes:
                manager.free(request)
        events: Any = manager.take_events()
        if events:
            self.kv_event_publisher.publish(KVEventBatch(ts=0.0, events=events))


def full_attention() -> KVCacheSpec:
    return FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)


def a_request(name: str | None, first_token: int, tokens: int = 3 * BLOCK_TOKENS + 5) -> Request:
    """A request with a prompt of three blocks and a bit, of one token over and over."""
    return Request(
        request_id=f"{name}-{first_token}-internal",
        prompt_token_ids=[first_token] * tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
        session_id=name,
    )


@contextmanager
def followed(spec: KVCacheSpec | None = None) -> Iterator[tuple[Any, LossPipe, LossLog]]:
    """A scheduler that is followed, and where it tells what it loses."""
    scheduler, log = StandIn(spec or full_attention()), LossLog()
    with LossPipe() as pipe:
        compat_losses.follow(scheduler, pipe.writer)
        yield scheduler, pipe, log


def heard(pipe: LossPipe, log: LossLog, since: int = 0) -> tuple[Loss, ...]:
    """What was told after a number."""
    pipe.read(log)
    return log.since(since).losses


@contract
def what_the_engine_drops_of_a_prompt_is_told_by_the_name_of_its_request() -> None:
    with followed() as (scheduler, pipe, log):
        scheduler.add_request(a_request("one", 1))
        scheduler.step()
        assert (heard(pipe, log), log.is_told) == ((), True)
        scheduler.add_request(a_request("two", 2))
        scheduler.step()
        assert heard(pipe, log) == ()
        # Blocks that were not full go first, then the tail of the oldest.
        scheduler.add_request(a_request("three", 3, 4 * BLOCK_TOKENS))
        scheduler.step()
        assert heard(pipe, log) == (Loss("one", BLOCK_TOKENS, 53),)
        scheduler.add_request(a_request("four", 4, 2 * BLOCK_TOKENS))
        scheduler.step()
        assert heard(pipe, log) == (Loss("one", 0, 53), Loss("two", 2 * BLOCK_TOKENS, 53))


@contract
def a_block_of_which_there_is_another_one_is_not_lost() -> None:
    with followed() as (scheduler, pipe, log):
        scheduler.add_request(a_request("one", 1, BLOCK_TOKENS + 1))
        scheduler.step(finishes=False)
        pool = scheduler.kv_cache_manager.block_pool
        (key,) = a_request("one", 1, BLOCK_TOKENS + 1).block_hashes
        (first,) = pool.get_cached_block(key, [0])
        # As of two requests that computed the same at the same time.
        (twin,) = pool.get_new_blocks(1)
        pool._insert_block_hash(first.block_hash, twin, num_tokens=BLOCK_TOKENS)
        pool.evict_blocks({twin.block_id})
        scheduler.step()
        assert heard(pipe, log) == ()
        pool.evict_blocks({first.block_id})
        scheduler.step()
        assert heard(pipe, log) == (Loss("one", 0, BLOCK_TOKENS + 1),)


@contract
def an_emptied_cache_is_told_at_once() -> None:
    with followed() as (scheduler, pipe, log):
        scheduler.add_request(a_request("one", 1))
        scheduler.step()
        assert scheduler.reset_prefix_cache()
        assert heard(pipe, log) == ()
        assert log.since(0).after == 1
        # What the pool says of it comes with the next step, when it would be said of what came since.
        scheduler.add_request(a_request("two", 2))
        scheduler.step()
        assert heard(pipe, log) == ()
        assert log.since(0).after == 1


@contract
def a_request_that_ends_before_its_prompt_is_computed_is_told() -> None:
    with followed() as (scheduler, pipe, log):
        begun, unbegun = a_request("begun", 1), a_request("unbegun", 2)
        scheduler.add_request(begun)
        scheduler.step(finishes=False)
        scheduler.add_request(unbegun)
        scheduler.finish_requests([begun, unbegun], RequestStatus.FINISHED_ABORTED)
        assert heard(pipe, log) == (Loss("unbegun", 0, 53),)


@contract
def requests_without_a_name_and_models_that_need_no_whole_prompt_are_not_followed() -> None:
    with followed() as (scheduler, pipe, log):
        for token in range(1, 6):
            scheduler.add_request(a_request(None, token))
            scheduler.step()
        assert heard(pipe, log) == ()
    window = SlidingWindowSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=32
    )
    with followed(window) as (scheduler, pipe, log):
        assert isinstance(scheduler.kv_event_publisher, NullEventPublisher)
        pipe.read(log)
        assert not log.is_told


@contract
def the_scheduler_calls_what_is_put_in_its_place() -> None:
    assert "self.kv_event_publisher.publish(batch)" in inspect.getsource(Scheduler.update_from_output)
    assert "self.kv_event_publisher.shutdown()" in inspect.getsource(Scheduler.shutdown)
    assert "self.scheduler.add_request(request)" in inspect.getsource(EngineCore.add_request)
    assert "self.scheduler.finish_requests(" in inspect.getsource(EngineCore.abort_requests)
    assert "self.scheduler.reset_prefix_cache(" in inspect.getsource(EngineCore.reset_prefix_cache)
    assert "return valid_requests" in inspect.getsource(Scheduler.finish_requests)
    # Requests are taken up after the constructor, where following begins.
    assert "self.scheduler: SchedulerInterface = Scheduler(" in inspect.getsource(EngineCore.__init__)
    assert "add_request" not in inspect.getsource(EngineCoreProc.__init__)


@contract
def a_request_carries_its_name_to_the_scheduler() -> None:
    assert "session_id" in parameters(AsyncLLM.add_request)
    assert "session_id=session_id" in inspect.getsource(AsyncLLM.generate)
    assert "session_id=request.session_id" in inspect.getsource(Request.from_engine_core_request)


@contract
def events_are_made_only_where_a_loss_means_something() -> None:
    original = EngineCoreProc.__init__

    def config(*, caches: bool = True, connector: str | None = None) -> Any:
        transfer = SimpleNamespace(kv_connector=connector) if connector else None
        return SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=caches),
            kv_transfer_config=transfer,
            kv_events_config=None,
        )

    with LossPipe() as pipe:
        for given, writer in (
            (config(caches=False), pipe.writer),
            (config(connector="OffloadingConnector"), pipe.writer),
            (config(), None),
        ):
            with compat_losses.telling(given, writer):
                assert EngineCoreProc.__init__ is original
            assert given.kv_events_config is None
        for given in (config(), config(connector="NixlConnector")):
            with compat_losses.telling(given, pipe.writer):
                assert EngineCoreProc.__init__ is not original
            assert EngineCoreProc.__init__ is original
            # No socket of vLLM's.
            assert isinstance(given.kv_events_config, KVEventsConfig)
            assert (given.kv_events_config.enable_kv_cache_events, given.kv_events_config.publisher) == (True, "null")


@contract
def vllm_s_configuration_of_events_is_none_unless_helios_sets_it() -> None:
    assert {field for field in compat.AsyncEngineArgs.__dataclass_fields__ if "kv_events" in field} == {
        "kv_events_config"
    }
    assert compat.AsyncEngineArgs.kv_events_config is None
