"""A LitAPI's hooks in the order in which LitServe calls them, for one request or for a batch. No threads here."""

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from helios.mesh.errors import Bug, HeliosError
from helios.worker.engines.custom.user_code import user_code


class Hooks:
    """Runs the hooks of one LitAPI; each gets the context where it has a parameter of that name.

    Errors are HeliosErrors that name the hook. Closing an iterator closes the user's generators.
    """

    def __init__(self, api: Any) -> None:
        self._api = api
        names = ("decode_request", "batch", "predict", "unbatch", "encode_response")
        self._with_context = {name for name in names if "context" in inspect.signature(getattr(api, name)).parameters}

    def run_one(self, request: Any) -> Iterator[Any]:
        """Yields the outputs for one request: one, or with ``stream`` as many as the API yields."""
        context: dict[str, Any] = {}
        predicted = self._call("predict", context, self._call("decode_request", context, request))
        encoded = self._call("encode_response", context, predicted)
        if not self._api.stream:
            yield encoded
            return
        yield from _closing("predict", encoded, predicted)

    def run_batch(self, requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Yields, for a batch, lists with an output or an error for each request."""
        contexts: list[dict[str, Any]] = [{} for _ in requests]
        inputs, failed = self._decode(requests, contexts)
        alive = [context for index, context in enumerate(contexts) if index not in failed]
        if not alive:
            yield [failed[index] for index in range(len(requests))]
            return
        predicted = self._call("predict", alive, self._call("batch", alive, inputs))
        unbatched = self._call("unbatch", alive, predicted)
        if self._api.stream:
            encoded = self._call("encode_response", alive, unbatched)
            rows: Iterator[Any] = _closing("predict", encoded, unbatched, predicted)
        else:
            rows = iter([self._encode(unbatched, alive)])
        for row in rows:
            outputs = list(row)
            if len(outputs) != len(alive):
                raise Bug(
                    f"predict or unbatch gave {len(outputs)} outputs for {len(alive)} requests",
                    reason="CUSTOM_CODE_FAILED",
                )
            merged = iter(outputs)
            yield [failed[index] if index in failed else next(merged) for index in range(len(requests))]

    async def run_async(self, request: Any) -> AsyncIterator[Any]:
        """Yields the outputs for one request of an API with ``enable_async``."""
        context: dict[str, Any] = {}
        decoded = await self._await("decode_request", context, request)
        predicted = await self._await("predict", context, decoded)
        encoded = await self._await("encode_response", context, predicted)
        if not self._api.stream:
            yield encoded
            return
        try:
            with user_code("predict"):
                if hasattr(encoded, "__aiter__"):
                    async for output in encoded:
                        yield output
                else:
                    for output in encoded:
                        yield output
        finally:
            for generator in (encoded, predicted):
                if inspect.isasyncgen(generator):
                    await generator.aclose()

    def _decode(self, requests: Sequence[Any], contexts: list[dict[str, Any]]) -> tuple[list[Any], dict[int, Any]]:
        """Returns the inputs, and by its place each request that could not be decoded, which fails alone."""
        inputs: list[Any] = []
        failed: dict[int, Any] = {}
        for index, (request, context) in enumerate(zip(requests, contexts, strict=True)):
            try:
                inputs.append(self._call("decode_request", context, request))
            except HeliosError as error:
                failed[index] = error
        return inputs, failed

    def _encode(self, outputs: Any, contexts: list[dict[str, Any]]) -> list[Any]:
        if len(outputs) != len(contexts):
            return list(outputs)
        return [self._call("encode_response", context, one) for context, one in zip(contexts, outputs, strict=True)]

    def _call(self, name: str, context: Any, value: Any) -> Any:
        hook: Callable[..., Any] = getattr(self._api, name)
        with user_code(name):
            return hook(value, context=context) if name in self._with_context else hook(value)

    async def _await(self, name: str, context: Any, value: Any) -> Any:
        result = self._call(name, context, value)
        if inspect.isawaitable(result):
            with user_code(name):
                return await result
        return result


def _closing(what: str, outputs: Any, *sources: Any) -> Iterator[Any]:
    """Yields the outputs and closes their generators, the outermost first, however it ends."""
    try:
        with user_code(what):
            yield from outputs
    finally:
        for generator in (outputs, *sources):
            if inspect.isgenerator(generator):
                with contextlib.suppress(RuntimeError), user_code(what):
                    generator.close()
