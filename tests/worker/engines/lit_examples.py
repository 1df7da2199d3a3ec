"""LitAPI classes as LitServe's users write them: nothing in here knows Helios."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import litserve as ls
from fastapi import HTTPException


def words(request: dict[str, Any]) -> list[str]:
    """Returns the words of the last message, or of the prompt."""
    text = request["messages"][-1]["content"] if "messages" in request else request["prompt"]
    return str(text).split()


class Echo(ls.LitAPI):
    """Streams the words of the prompt; after its own end it begins again, up to max_tokens."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments | {"stream": True})

    def setup(self, device: str) -> None:
        self.pace_seconds = 0.002

    def decode_request(self, request: dict[str, Any]) -> tuple[list[str], int]:
        return words(request), int(request.get("max_tokens") or 16)

    def predict(self, x: tuple[list[str], int]) -> Iterator[str]:
        parts, count = x
        for index in range(count):
            time.sleep(self.pace_seconds)
            yield parts[index % len(parts)] + " "

    def encode_response(self, output: Iterator[str]) -> Iterator[str]:
        yield from output


class Upper(ls.LitAPI):
    """A text in, a text out."""

    def setup(self, device: str) -> None:
        self.seen_device = device

    def decode_request(self, request: dict[str, Any]) -> str:
        return " ".join(words(request))

    def predict(self, x: str) -> str:
        return x.upper()

    def encode_response(self, output: str) -> str:
        return output


class Square(ls.LitAPI):
    """LitServe's own first example: a dict in, a dict out, and OpenAI nowhere."""

    def setup(self, device: str) -> None:
        self.power = 2

    def decode_request(self, request: dict[str, Any]) -> float:
        return float(words(request)[0])

    def predict(self, x: float) -> float:
        return float(x**self.power)

    def encode_response(self, output: float) -> dict[str, float]:
        return {"output": output}


class Document(ls.LitAPI):
    """Makes OpenAI's document itself, with a count of tokens."""

    def decode_request(self, request: dict[str, Any]) -> str:
        return " ".join(words(request))

    def predict(self, x: str) -> str:
        return x

    def encode_response(self, output: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": output}
        return {
            "id": "own",
            "object": "chat.completion",
            "created": 1,
            "model": "own",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        }


class Vectors(ls.LitAPI):
    """Makes vectors, and OpenAI's document of them: the length of each text."""

    def setup(self, device: str) -> None:
        del device

    def decode_request(self, request: dict[str, Any]) -> list[str]:
        return [request["input"]] if isinstance(request["input"], str) else list(request["input"])

    def predict(self, texts: list[str]) -> list[float]:
        return [float(len(text)) for text in texts]

    def encode_response(self, lengths: list[float]) -> dict[str, Any]:
        data = [{"object": "embedding", "index": i, "embedding": [x]} for i, x in enumerate(lengths)]
        return {"object": "list", "model": "mine", "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}}


class Batched(ls.LitAPI):
    """Answers with the size of the batch that it was in."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=4, batch_timeout=0.3)

    def decode_request(self, request: dict[str, Any], context: dict[str, Any]) -> str:
        text = " ".join(words(request))
        if text == "bad":
            raise HTTPException(status_code=422, detail="bad words")
        context["text"] = text
        return text

    def predict(self, x: list[str]) -> list[int]:
        return [len(x)] * len(x)

    def encode_response(self, output: int, context: dict[str, Any]) -> str:
        return f"{context['text']} in {output}"


class BatchedStream(ls.LitAPI):
    """Streams to a whole batch."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=2, batch_timeout=0.3, stream=True)

    def decode_request(self, request: dict[str, Any]) -> str:
        return words(request)[0]

    def predict(self, x: list[str]) -> Iterator[list[str]]:
        for number in range(3):
            yield [f"{text}{number} " for text in x]

    def encode_response(self, output: Iterator[list[str]]) -> Iterator[list[str]]:
        yield from output


class Async(ls.LitAPI):
    """Coroutines, many at a time."""

    def __init__(self) -> None:
        super().__init__(enable_async=True, stream=True)

    async def decode_request(self, request: dict[str, Any]) -> list[str]:
        return words(request)

    async def predict(self, x: list[str]) -> AsyncIterator[str]:
        for word in x:
            await asyncio.sleep(0.05)
            yield f"{word} "

    async def encode_response(self, output: AsyncIterator[str]) -> AsyncIterator[dict[str, str]]:
        async for text in output:
            yield {"role": "assistant", "content": text}


class BrokenSetup(ls.LitAPI):
    """Can't start."""

    def setup(self, device: str) -> None:
        raise RuntimeError(f"no weights for {device}")

    def predict(self, x: Any) -> Any:
        return x


class BrokenPredict(ls.LitAPI):
    """Fails as the prompt says: at once, or in the middle of an answer."""

    def __init__(self) -> None:
        super().__init__(stream=True)

    def decode_request(self, request: dict[str, Any]) -> str:
        return words(request)[0]

    def predict(self, x: str) -> Iterator[str]:
        if x == "status":
            raise HTTPException(status_code=429, detail="come back later")
        if x == "middle":
            yield "so far "
        raise ValueError("out of ideas")

    def encode_response(self, output: Iterator[str]) -> Iterator[str]:
        yield from output


class Closing(ls.LitAPI):
    """Notes when its generator is closed."""

    closed: list[str]

    def __init__(self) -> None:
        super().__init__(stream=True)

    def setup(self, device: str) -> None:
        type(self).closed = []

    def decode_request(self, request: dict[str, Any]) -> str:
        return words(request)[0]

    def predict(self, x: str) -> Iterator[str]:
        try:
            while True:
                time.sleep(0.01)
                yield x
        finally:
            self.closed.append(x)

    def encode_response(self, output: Iterator[str]) -> Iterator[str]:
        for part in output:
            yield part + " "


class WithSpec(ls.LitAPI):
    """Brings a LitSpec, which has no place in Helios."""

    def __init__(self) -> None:
        super().__init__(spec=ls.OpenAISpec())

    def predict(self, x: Any) -> Iterator[str]:
        yield str(x)


configured = Upper(max_batch_size=1)


class Endless(ls.LitAPI):
    """Makes parts faster than anybody reads."""

    def __init__(self) -> None:
        super().__init__(stream=True)

    def predict(self, x: Any) -> Iterator[str]:
        while True:
            yield "on and "

    def encode_response(self, output: Iterator[str]) -> Iterator[str]:
        yield from output


class Odd(ls.LitAPI):
    """Gives what no hook should: too few outputs, no list at all, or the end of the process."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=2)

    def decode_request(self, request: dict[str, Any]) -> str:
        return words(request)[0]

    def predict(self, x: list[str]) -> Any:
        if x[0] == "exit":
            raise SystemExit(3)
        return {"few": [], "none": None}.get(x[0], x)

    def unbatch(self, output: Any) -> Any:
        return output
