"""Events of a chat's stream, made from vLLM's own first one: a part of ``compat``.

For each token vLLM makes three pydantic models and a JSON document of them, of which only the text is new. That was a
third of what the front process did without its transport. Here vLLM's generator makes the first event with text, and
each further one is that event with another text, byte for byte what vLLM would have made; everything that is not
plain text, and the end of the answer with its reason and usage, is made by vLLM again.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final, Self

import pydantic_core
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.outputs import RequestOutput

from helios.worker.engines.vllm.compat_version import is_pinned

_BEFORE_TEXT: Final = '"delta":{"content":'
_AFTER_TEXT: Final = '},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'


class TemplatedServingChat(OpenAIServingChat):
    """vLLM's chat, with streams of plain text made from a template."""

    def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        """Returns what vLLM's own generator does, event for event."""
        is_plain = self.parser_cls is None and (request.n or 1) == 1 and not (request.logprobs or request.echo)
        is_ours = is_plain and is_pinned()
        relay = _Relay(result_generator)
        results = relay if is_ours else result_generator
        events: AsyncGenerator[str, None] = super().chat_completion_stream_generator(request, results, *args, **kwargs)
        return _templated(events, relay) if is_ours else events


class _Relay:
    """Outputs on their way to vLLM's generator, of which those of plain text may be taken out.

    Their tokens come to vLLM with the next output that does, because it counts them for the usage.
    """

    def __init__(self, results: AsyncIterator[RequestOutput]) -> None:
        self._results = results
        self._next: RequestOutput | Exception | None = None
        self.text: str | None = None
        """The text of the output that vLLM took last; None where it is not one of plain text."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        """Gives vLLM the next output, or the error in its place."""
        kept, self._next = self._next, None
        if isinstance(kept, Exception):
            raise kept
        output: RequestOutput = kept or await anext(self._results)
        self.text = output.outputs[0].text if _is_plain(output) else None
        return output

    async def texts(self) -> AsyncGenerator[str, None]:
        """Takes outputs out for as long as they are of plain text. vLLM gets the next one, or the error."""
        token_ids: list[int] = []
        try:
            async for output in self._results:
                choice = output.outputs[0]
                if not _is_plain(output):
                    choice.token_ids = [*token_ids, *choice.token_ids]
                    self._next = output
                    return
                token_ids += choice.token_ids
                yield choice.text
        except Exception as error:  # noqa: BLE001  raised in vLLM's generator, which makes an event of any
            self._next = error

    async def aclose(self) -> None:
        """Ends the generation where it has not ended."""
        close = getattr(self._results, "aclose", None)
        if close is not None:
            await close()


def _is_plain(output: RequestOutput) -> bool:
    return not output.finished and len(output.outputs) == 1 and output.outputs[0].finish_reason is None


async def _templated(events: AsyncGenerator[str, None], relay: _Relay) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(relay), contextlib.aclosing(events):
        async for event in events:
            yield event
            before = _template(event, relay.text)
            if before is not None:
                async with contextlib.aclosing(relay.texts()) as texts:
                    async for text in texts:
                        yield f"{before}{_json(text)}{_AFTER_TEXT}"


def _template(event: str, text: str | None) -> str | None:
    """Returns what stands before the text in an event that has nothing but text in it; None for any other event."""
    if text is None:
        return None
    ending = f"{_json(text)}{_AFTER_TEXT}"
    before = event.removesuffix(ending)
    return before if event.endswith(ending) and before.endswith(_BEFORE_TEXT) else None


def _json(text: str) -> str:
    # The serializer that pydantic's models use.
    return pydantic_core.to_json(text).decode()
