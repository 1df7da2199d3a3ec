"""What Helios leans on in vLLM for what happens to every token; see `contracts`."""

import asyncio
import dataclasses
import importlib
import inspect
import re
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import vllm.envs
import zmq
import zmq.asyncio
from vllm.entrypoints.generate.base.protocol import DeltaMessage, RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.exceptions import GenerationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, UtilityOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from helios.worker.engines.vllm import compat, compat_outputs
from tests.worker.engines import contracts
from tests.worker.engines.contracts import contract, parameters


@contract
def vllm_leaves_its_reader_of_outputs_alone_where_there_is_one() -> None:
    # The pump is put in the place of both of vLLM's tasks before anything is asked of the engine.
    source = inspect.getsource(AsyncMPClient._ensure_output_queue_task)
    assert "if resources.output_queue_task is not None:\n            return" in source
    assert "self.output_handler is not None" in inspect.getsource(AsyncLLM._run_output_handler)
    assert {"output_socket", "output_queue_task", "engine_dead"} <= {
        field.name for field in dataclasses.fields(BackgroundResources)
    }
    assert "task.cancel()" in inspect.getsource(BackgroundResources.__call__)
    assert {"engine_core_outputs", "engine_core_timestamp", "iteration_stats", "weight_version"} <= parameters(
        OutputProcessor.process_outputs
    )
    assert {"scheduler_stats", "iteration_stats", "engine_idx"} <= parameters(StatLoggerManager.record)
    assert "request_ids" in parameters(AsyncMPClient.abort_requests_async)


class FakeEngine:
    """What an OutputPump needs of AsyncLLM, with a real socket, real messages and a recorder behind it."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.receiving = receiving = context.socket(zmq.PULL)
        self.sending = zmq.Context(context).socket(zmq.PUSH)
        self.sending.connect(f"tcp://127.0.0.1:{receiving.bind_to_random_port('tcp://127.0.0.1')}")
        self.resources = BackgroundResources(ctx=zmq.Context(context))
        self.resources.output_socket = receiving
        self.decoder = MsgpackDecoder(EngineCoreOutputs)
        self.utility_results: dict[int, Any] = {}
        self.seen: list[Any] = []
        self.aborted: list[str] = []
        self.told: list[Exception] = []
        self.pump = compat.OutputPump(self, self, self.record)

    def process_outputs(self, outputs: Any, *_: Any, **__: Any) -> Any:
        if outputs[0].request_id == "bad":
            raise ValueError("this one can't be processed")
        self.seen += [output.request_id for output in outputs]
        return SimpleNamespace(reqs_to_abort=["stopped"] if outputs[0].request_id == "stopped" else [])

    def update_scheduler_stats(self, _: Any) -> None:
        pass

    def record(self, scheduler_stats: Any, iteration_stats: Any, engine_idx: int) -> None:
        self.seen.append((scheduler_stats is not None, iteration_stats is not None, engine_idx))

    def propagate_error(self, error: Exception) -> None:
        self.told.append(error)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


def outputs_of(request_id: str) -> EngineCoreOutputs:
    """Returns a message with one token."""
    return EngineCoreOutputs(outputs=[EngineCoreOutput(request_id=request_id, new_token_ids=[1])])


async def pump(
    *messages: EngineCoreOutputs | bytes,
    until: Callable[[FakeEngine], bool],
    utility_results: dict[int, Any] | None = None,
) -> FakeEngine:
    """Gives messages to a pump; returns when ``until`` holds and the pump was cancelled or had ended."""
    context = zmq.asyncio.Context()
    engine = FakeEngine(context)
    engine.utility_results |= utility_results or {}
    try:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            task = group.create_task(engine.pump.run())
            for message in messages:
                engine.sending.send_multipart(
                    [message] if isinstance(message, bytes) else MsgpackEncoder().encode(message)
                )
            while not until(engine):
                await asyncio.sleep(0.005)
            task.cancel()
    finally:
        engine.sending.close(0)
        engine.receiving.close(0)
        context.term()
    return engine


@contract
def the_pump_gives_outputs_and_statistics_to_vllm_s_processor() -> None:
    only_statistics = EngineCoreOutputs(scheduler_stats=SchedulerStats(num_running_reqs=1))
    engine = asyncio.run(pump(outputs_of("a"), only_statistics, until=lambda engine: len(engine.seen) == 3))
    assert engine.seen == ["a", (False, True, 0), (True, False, 0)]
    # Whoever cancels it has shut the engine down, or seen it die.
    assert [type(error) for error in engine.told] == [EngineDeadError]


@contract
def the_pump_aborts_what_a_stop_string_ended() -> None:
    engine = asyncio.run(pump(outputs_of("stopped"), outputs_of("b"), until=lambda engine: bool(engine.aborted)))
    assert engine.aborted == ["stopped"]


@contract
def the_pump_answers_utility_calls() -> None:
    answers: list[Any] = []
    waiting = SimpleNamespace(set_result=answers.append)
    message = EngineCoreOutputs(utility_output=UtilityOutput(call_id=7, result=UtilityResult("yes")))
    engine = asyncio.run(pump(message, until=lambda _: bool(answers), utility_results={7: waiting}))
    assert answers == ["yes"]
    assert engine.seen == []


@contract
def the_pump_tells_every_request_when_the_engine_dies_or_can_t_be_understood() -> None:
    dead = asyncio.run(pump(EngineCoreProc.ENGINE_CORE_DEAD, until=lambda engine: bool(engine.told)))
    assert dead.resources.engine_dead
    assert [type(error) for error in dead.told] == [EngineDeadError]
    garbled = asyncio.run(pump(outputs_of("bad"), outputs_of("c"), until=lambda engine: bool(engine.told)))
    assert [type(error) for error in garbled.told] == [ValueError]
    assert garbled.seen == []


@contract
def events_are_the_same_without_the_check_of_fields() -> None:
    def event() -> str:
        choice = ChatCompletionResponseStreamChoice(index=0, delta=DeltaMessage(content="x"), finish_reason=None)
        chunk = ChatCompletionStreamResponse(id="i", created=1, model="m", choices=[choice])
        return str(chunk.model_dump_json(exclude_unset=True))

    before = event()
    compat.prepare_before_fork()
    assert event() == before
    for model in compat_outputs.STREAMED:
        assert compat_outputs.FIELD_CHECK not in model.__pydantic_decorators__.model_validators
    # vLLM still has the check, in requests and in answers that are not streamed.
    assert compat_outputs.FIELD_CHECK in compat.ChatCompletionResponse.__pydantic_decorators__.model_validators
    assert compat_outputs.FIELD_CHECK in compat.ChatCompletionRequest.__pydantic_decorators__.model_validators


# What JSON escapes and what it may not, what is longer than a byte, nothing at all, and what looks like an event's end.
TEXTS = [
    "Once",
    "",
    ' "q" \\ ',
    "\n\t\x00\x1f\x7f",
    "é\u2028😀",
    '},"logprobs":null,"finish_reason":null,"token_ids":null}]}',
    " the",
    ".",
]


async def outputs(
    texts: list[str], failure: Exception | None = None, count: int = 1
) -> AsyncGenerator[RequestOutput, None]:
    """Yields outputs as AsyncLLM does, the last one finished, or an error after them."""
    for at, text in enumerate(texts):
        is_last = at == len(texts) - 1 and failure is None
        choices = [
            CompletionOutput(index, text, [at, at], None, None, finish_reason="length" if is_last else None)
            for index in range(count)
        ]
        yield RequestOutput("id", None, [1, 2, 3], None, choices, finished=is_last, num_cached_tokens=2)
    if failure is not None:
        raise failure


async def chat_events(serving_class: Any, results: AsyncGenerator[RequestOutput, None], **fields: Any) -> list[str]:
    """Returns a stream's events, without the time."""
    serving = serving_class.__new__(serving_class)
    vars(serving).update(
        parser_cls=None,
        response_role="assistant",
        request_logger=None,
        enable_log_outputs=False,
        enable_log_deltas=False,
        enable_force_include_usage=False,
        enable_prompt_tokens_details=True,
        enable_per_request_metrics=False,
        system_fingerprint="print",
        _include_reasoning_tokens_details=False,
    )
    messages = [{"role": "user", "content": "Once"}]
    request = compat.ChatCompletionRequest.model_validate({"messages": messages, "stream": True, **fields})
    metadata = RequestResponseMetadata(request_id="chat-1")
    events = serving.chat_completion_stream_generator(request, results, "chat-1", "m", messages, None, metadata)
    return [re.sub(r'"created":\d+', "", event) async for event in events]


@contract
def events_from_a_template_are_those_that_vllm_makes() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"return_token_ids": True},
        {"return_prompt_text": True},
        {"echo": True},
        {"n": 2},
    ]
    for texts in (TEXTS, TEXTS[::-1], ["", "", "x", ""], ["all at once"], ["\n"] * 5):
        for fields in variants:
            for failure in (None, EngineDeadError(), GenerationError("broken")):
                stock, ours = (
                    asyncio.run(chat_events(kind, outputs(texts, failure, fields.get("n", 1)), **fields))
                    for kind in (OpenAIServingChat, compat.OpenAIServingChat)
                )
                assert ours == stock, (texts, fields, failure)
                assert stock[-1] == "data: [DONE]\n\n"


@contract
def a_template_spares_vllm_s_generator_the_texts_between() -> None:
    taken: list[RequestOutput] = []
    original: Any = OpenAIServingChat.chat_completion_stream_generator

    async def watched(self: Any, request: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
        async def noted() -> Any:
            async for output in results:
                taken.append(output)
                yield output

        async for event in original(self, request, noted(), *args, **kwargs):
            yield event

    stock: Any = OpenAIServingChat
    stock.chat_completion_stream_generator = watched
    try:
        asyncio.run(chat_events(compat.OpenAIServingChat, outputs(TEXTS)))
    finally:
        stock.chat_completion_stream_generator = original
    given = [output.outputs[0].text for output in taken]
    assert given == [TEXTS[0], TEXTS[-1]], given


@contract
def a_stream_that_is_closed_ends_the_generation() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncGenerator[RequestOutput, None]:
        try:
            async for output in outputs(["x"] * 1000):
                yield output
        finally:
            closed.append(True)

    async def run(after: int) -> None:
        serving: Any = compat.OpenAIServingChat.__new__(compat.OpenAIServingChat)
        vars(serving).update(parser_cls=None, response_role="assistant", request_logger=None)
        vars(serving).update(enable_log_outputs=False, enable_force_include_usage=False)
        vars(serving).update(_include_reasoning_tokens_details=False, system_fingerprint=None)
        request = compat.ChatCompletionRequest.model_validate({"messages": [], "stream": True})
        events = serving.chat_completion_stream_generator(request, endless(), "i", "m", [], None, None)
        for _ in range(after):
            await anext(events)
        await events.aclose()

    for after in (1, 2, 3, 9):
        asyncio.run(run(after))
    assert len(closed) == 4


@contract
def variables_of_the_environment_can_be_kept() -> None:
    assert callable(vllm.envs.enable_envs_cache)


if __name__ == "__main__":
    # Collects the contracts of the other files.
    importlib.import_module("tests.worker.engines.continuation_contracts")
    importlib.import_module("tests.worker.engines.early_contracts")
    importlib.import_module("tests.worker.engines.loss_contracts")
    importlib.import_module("tests.worker.engines.setting_contracts")
    importlib.import_module("tests.worker.engines.sleep_contracts")
    importlib.import_module("tests.worker.engines.weight_contracts")
    contracts.main()
