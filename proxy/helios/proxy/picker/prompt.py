"""The prompt of a request, as bytes whose beginnings are equal where those of the rendered prompts are.

Rendering and tokenizing would be exact, and cost more than they save here. What templates put first comes first: tools,
then messages in their order.
"""

from typing import Any, Final, NamedTuple

import orjson
from google.protobuf.message import Message

from helios.api.inference.v1 import inference_service_pb2 as inference_pb


class Prompt(NamedTuple):
    """What an engine is to compute; ``salt`` keeps caches of equal prompts apart (vLLM's `cache_salt`)."""

    text: bytes
    salt: str = ""


NO_PROMPT: Final = Prompt(b"")


def openai_prompt(document: dict[str, Any]) -> Prompt:
    """The prompt of an OpenAI request; empty where it has none, or not as it should."""
    parts: list[object] = [document["tools"]] if document.get("tools") else []
    messages, prompt = document.get("messages"), document.get("prompt")
    if isinstance(messages, list):
        parts += messages
    elif isinstance(prompt, str | list):
        parts.append(prompt)
    salt = document.get("cache_salt")
    return Prompt(b"".join(map(orjson.dumps, parts)), salt if isinstance(salt, str) else "")


def native_prompt(request: Message) -> Prompt:
    """The prompt of a native request, in messages, text or tokens."""
    match request:
        case inference_pb.ChatRequest():
            return Prompt(b"".join(message.SerializeToString(deterministic=True) for message in request.messages))
        case inference_pb.CompleteRequest():
            return Prompt(request.text.encode() or request.token_ids.SerializeToString(deterministic=True))
        case _:
            return NO_PROMPT
