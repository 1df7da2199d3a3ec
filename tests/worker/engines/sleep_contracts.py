"""What Helios leans on in vLLM for models that sleep; run with `contracts`."""

import ast
import asyncio
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import vllm
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import Executor

from helios.worker.engines.vllm import compat
from tests.worker.engines.contracts import contract, parameters


@contract
def sleep_and_wake_go_through_async_llm_to_all_ranks() -> None:
    assert {"level", "mode"} <= parameters(AsyncLLM.sleep)
    assert {"tags"} <= parameters(AsyncLLM.wake_up)
    assert {"method", "args"} <= parameters(AsyncLLM.collective_rpc)
    for name in ("sleep", "wake_up", "collective_rpc", "reset_prefix_cache"):
        assert inspect.iscoroutinefunction(getattr(AsyncLLM, name))
    for name in ("sleep", "wake_up"):
        assert callable(getattr(Executor, name))


@contract
def the_device_worker_of_a_gpu_reloads_weights_in_place_and_sleeps() -> None:
    # Read, not imported: importing the GPU's worker needs its libraries.
    tree = ast.parse(Path(vllm.__file__).with_name("v1").joinpath("worker/gpu_worker.py").read_text())
    (worker,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Worker"]
    methods = {node.name: node for node in worker.body if isinstance(node, ast.FunctionDef)}
    assert {"sleep", "wake_up", "reload_weights"} <= methods.keys()
    assert [argument.arg for argument in methods["sleep"].args.args] == ["self", "level"]
    assert [argument.arg for argument in methods["wake_up"].args.args] == ["self", "tags"]
    runner = Path(vllm.__file__).with_name("v1").joinpath("worker/gpu_model_runner.py").read_text()
    assert "def reload_weights(" in runner


@contract
def weights_and_kv_cache_are_the_tags_of_waking() -> None:
    source = Path(vllm.__file__).with_name("v1").joinpath("worker/gpu_worker.py").read_text()
    assert '"weights" in tags' in source
    assert 'tag="kv_cache"' in source


@contract
def sleep_mode_is_an_engine_argument_that_a_cpu_refuses() -> None:
    assert "enable_sleep_mode" in {field.name for field in dataclasses.fields(compat.AsyncEngineArgs)}
    assert compat.can_sleep() is not current_platform.is_cpu()


@contract
def putting_to_sleep_drops_the_prefix_cache_and_waking_loads_weights_before_the_cache_takes_room() -> None:
    calls: list[str] = []

    class Ranks:
        @property
        def adapters(self) -> Any:
            return SimpleNamespace(reload=self.reload_adapters)

        def __getattr__(self, name: str) -> Any:
            async def call(*arguments: Any, **named: Any) -> None:
                calls.append(" ".join(map(str, (name, *arguments, *named.values()))))

            return call

    async def cycle() -> None:
        ranks = cast(Any, Ranks())
        await compat.put_to_sleep(ranks, 2)
        await compat.wake_up(ranks, 2)

    asyncio.run(cycle())
    assert calls == [
        "reset_prefix_cache",
        "sleep 2",
        "wake_up ['weights']",
        "collective_rpc reload_weights",
        "wake_up ['kv_cache']",
        "reload_adapters",
    ]


@contract
def what_a_rank_could_not_do_is_a_runtime_error() -> None:
    class Broken:
        async def wake_up(self, **_: Any) -> None:
            # As vLLM's client raises what a utility call to its core failed with.
            raise Exception("Call to wake_up method failed: out of memory")  # noqa: TRY002

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(compat.wake_up(cast(Any, Broken()), 2))
