"""What users' code gives as an answer, or as a part of one, and what it means. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import BaseModel

from helios.mesh.errors import Bug


@dataclass(frozen=True, slots=True)
class Output:
    """An answer or a part of one.

    Attributes:
        text: Its text; of a document, that of its first choice.
        document: OpenAI's own document, where it is one.
        usage: OpenAI's count of tokens, where there is one.
    """

    text: str
    document: Mapping[str, Any] | None = None
    usage: Mapping[str, Any] | None = None


def read_output(value: Any) -> Output:
    """Returns what a value of ``encode_response`` means. Raises Bug (BAD_OUTPUT) for what is neither text nor JSON."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, str):
        return Output(value)
    if isinstance(value, bytes):
        return Output(value.decode(errors="replace"))
    if isinstance(value, dict):
        usage = value.get("usage") if isinstance(value.get("usage"), dict) else None
        if isinstance(value.get("choices"), list):
            _json(value)
            return Output(_text_of_choice(value["choices"]), value, usage)
        if isinstance(value.get("data"), list):
            # Vectors.
            _json(value)
            return Output("", value, usage)
        for name in ("content", "text"):
            if isinstance(value.get(name), str):
                return Output(value[name], None, usage)
    return Output(_json(value))


def as_chunk(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a whole answer of OpenAI's as the one chunk of a stream."""
    if document.get("object") != "chat.completion":
        return dict(document)
    choices = [
        {name: value for name, value in choice.items() if name != "message"} | {"delta": choice.get("message", {})}
        for choice in document["choices"]
    ]
    return {**document, "object": "chat.completion.chunk", "choices": choices}


def _text_of_choice(choices: list[Any]) -> str:
    choice = choices[0] if choices and isinstance(choices[0], dict) else {}
    for holder in (choice.get("delta"), choice.get("message")):
        if isinstance(holder, dict):
            return str(holder.get("content") or "")
    return str(choice.get("text") or "")


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    except TypeError as error:
        raise Bug(f"encode_response gave a {type(value).__name__}: {error}", reason="BAD_OUTPUT") from error
