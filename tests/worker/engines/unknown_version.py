"""`python -m tests.worker.engines.unknown_version SPEC`: makes the engine of a spec (JSON) as a launcher and a replica
do, under a version of vLLM that nobody knows; prints a JSON object of what was said, replaced and answered.
"""

import asyncio
import importlib.metadata
import json
import sys
from typing import Any

import structlog.testing
import vllm
import vllm.tokenizers.registry
import vllm.v1.engine.utils
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from helios.worker.engines.vllm import compat_outputs, compat_streams, factory
from helios.worker.replica.engine import EventStream, Meter, OpenAICall
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.replica.start import EngineStart


def patchable() -> dict[str, Any]:
    """Returns what Helios replaces in a version that it knows."""
    return {
        "fork": vars(vllm.v1.engine.utils)["get_mp_context"],
        "plugins": importlib.metadata.entry_points,
        "tokenizers": vllm.tokenizers.registry.cached_get_tokenizer,
        "platform": vars(type(current_platform)).get("register_triton_kernel_overrides"),
        "checks": compat_outputs.FIELD_CHECK in ChatCompletionStreamResponse.__pydantic_decorators__.model_validators,
    }


async def stream(start: EngineStart) -> dict[str, Any]:
    """Has one chat streamed."""
    engine: Any = await asyncio.wrap_future(start.engine)
    templates: list[str] = []

    def refused(event: str, text: str | None) -> None:
        del text
        templates.append(event)

    setattr(compat_streams, "_template", refused)  # noqa: B010
    message = {"role": "user", "content": "Say hello."}
    meter = Meter("mine", 0.0)
    document = {
        "model": "smollm2-135m-instruct",
        "messages": [message],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
    }
    answer = await engine.answer(OpenAICall.CHAT_COMPLETION, document, meter)
    assert isinstance(answer, EventStream)
    events = [event async for event in answer.events]
    reader = engine._llm.output_handler.get_coro().__qualname__
    engine.close()
    return {"events": events, "tokens": meter.completion_tokens, "reader": reader, "templates": templates}


def main() -> None:
    """Starts the engine, has it answer, prints what came of it."""
    setattr(vllm, "__version_tuple__", (0, 99, 0))  # noqa: B010
    spec = ReplicaSpec.from_document(json.loads(sys.argv[1]))
    before = patchable()
    with structlog.testing.capture_logs() as logs:
        factory.preload()
        factory.prepare(spec)
        start = EngineStart(spec)
        start.run_until_forked()
        outcome = asyncio.run(stream(start))
    after = patchable()
    outcome["replaced"] = [name for name, value in before.items() if after[name] is not value]
    outcome["warnings"] = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    outcome["stock_reader"] = f"{AsyncLLM._run_output_handler.__qualname__}.<locals>.output_handler"
    outcome["failure"] = start.failure
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
