"""Outputs of the engine on their way to the requests: the part of ``compat`` that runs for every token.

vLLM reads EngineCore's messages in one task, hands them through a queue to a second one, and that through an event to
the request's: three turns of the event loop for each token. At one stream a token finds the caches cold (the engine
streams the weights through them between two tokens), so every layer costs several times what it does in a loop. Here
a message is read and processed in one turn.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog
import zmq
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import CompletionResponseStreamChoice, CompletionStreamResponse
from vllm.v1.engine.core_client import AsyncMPClient, _process_utility_output
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import IterationStats

from helios.worker.engines.vllm.socket_reader import SocketReader

log = structlog.get_logger()


# What an event of a stream is made of, parts before wholes: a whole has the parts' validators built in.
STREAMED: Final = (
    DeltaMessage,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
FIELD_CHECK: Final = "__log_extra_fields__"


def spare_checks_of_answers() -> None:
    """Takes a check of unknown fields from vLLM's own answers: a Python call for each of the three parts of an event.

    It is for requests, of which it logs the fields that it does not know; an answer is made by vLLM from keywords.
    """
    for model in STREAMED:
        model.__pydantic_decorators__.model_validators.pop(FIELD_CHECK, None)
        model.model_rebuild(force=True)


class OutputPump:
    """Takes EngineCore's messages and gives each request what is its own; stands for vLLM's two tasks.

    ``run`` is its life, as a task that vLLM cancels when the engine is shut down or has died. When it ends, however it
    ends, every request that waits is told.
    """

    def __init__(self, client: Any, processor: Any, record: Callable[..., None]) -> None:
        """Takes AsyncLLM's core client, its output processor and its logger manager's ``record``."""
        self._client = client
        self._processor = processor
        self._record = record
        self._to_abort: list[str] = []
        self._failure: Exception | None = None
        self._is_needed = asyncio.Event()

    @staticmethod
    def can_stand_for(llm: Any) -> bool:
        """Returns whether ``llm`` needs nothing that this leaves out: several engines, caches of images."""
        return (
            type(llm.engine_core) is AsyncMPClient
            and llm.engine_core.resources.output_queue_task is None
            and llm.logger_manager is not None
            and llm.renderer.mm_processor_cache is None
            and not llm.vllm_config.parallel_config.enable_fault_tolerance
        )

    async def run(self) -> None:
        """Works until it is cancelled or the engine fails."""
        failure: Exception = EngineDeadError()
        try:
            with SocketReader(self._client.resources.output_socket, self._take):
                while True:
                    await self._is_needed.wait()
                    self._is_needed.clear()
                    if self._failure is not None:
                        failure = self._failure
                        break
                    stopped, self._to_abort = self._to_abort, []
                    await self._client.abort_requests_async(stopped)
            log.error("engine's outputs can't be read", exc_info=failure)
        finally:
            self._processor.propagate_error(failure)

    def _take(self, frames: list[zmq.Frame]) -> None:
        if self._failure is not None:
            return
        try:
            self._handle(frames)
        except Exception as error:  # noqa: BLE001  of a callback only the loop would hear; the task tells every request
            self._failure = error
            self._is_needed.set()

    def _handle(self, frames: list[zmq.Frame]) -> None:
        client, processor = self._client, self._processor
        client.resources.validate_alive(frames)
        outputs = client.decoder.decode(frames)
        if outputs.utility_output:
            _process_utility_output(outputs.utility_output, client.utility_results)
            return
        if not outputs.outputs and outputs.scheduler_stats is None:
            return
        statistics = None
        if outputs.outputs:
            statistics = IterationStats()
            processed = processor.process_outputs(
                outputs.outputs, outputs.timestamp, statistics, weight_version=outputs.weight_version
            )
            if processed.reqs_to_abort:
                # Stop strings are found here, after the engine has gone on.
                self._to_abort += processed.reqs_to_abort
                self._is_needed.set()
        processor.update_scheduler_stats(outputs.scheduler_stats)
        self._record(outputs.scheduler_stats, statistics, engine_idx=outputs.engine_index)
