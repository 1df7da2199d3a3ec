"""Reading OpenAI's request bodies, for engines that have no serving code of their own.

What these engines can't do is refused by name rather than left out of the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from helios.mesh.errors import InvalidRequest
from helios.worker.replica.engine import Conversation, OpenAICall, Prompt, Sampling, Text, TokenIds, Turn
from helios.worker.replica.sampling import check_sampling

# Fields of the two calls that change the answer and that only vLLM's own serving code knows.
_REFUSED: Final = (
    *("tools", "functions", "logit_bias", "suffix", "echo", "audio", "prediction", "web_search_options"),
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "prompt_logprobs"),
)
# What OpenAI's completions end at when the caller names no length.
_COMPLETION_TOKENS: Final = 16
# Wrappers that pydantic puts into the path of an error; a caller knows only the names of fields.
_INTERNAL_MARKS: Final = frozenset("[](){}-")
_TYPE_NAMES: Final = frozenset({"str", "int", "float", "bool", "nullable"})
_REPORTED_ERRORS: Final = 3


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """What a body asks for. ``has_usage``: a stream ends with an event that counts tokens."""

    prompt: Prompt
    sampling: Sampling
    is_stream: bool
    has_usage: bool


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    name: str | None = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class _ResponseFormat(BaseModel):
    type: Literal["text"]


class _Body(BaseModel):
    """Fields of both calls; what is not named here does not change the answer."""

    model_config = ConfigDict(strict=True)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _ResponseFormat | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None


class _ChatBody(_Body):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _CompletionBody(_Body):
    prompt: str | list[int] | list[str]
    logprobs: int | None = None


def read_request(call: OpenAICall, document: Mapping[str, Any], *, vocabulary_size: int) -> OpenAIRequest:
    """Reads a body. Raises InvalidRequest that names the first offending field (``param`` in the metadata)."""
    if call is OpenAICall.EMBEDDING:
        raise InvalidRequest(
            "the engine of this model makes text, not vectors",
            reason="WRONG_KIND_OF_MODEL",
            metadata={"param": "model"},
        )
    for name in _REFUSED:
        if document.get(name):
            raise InvalidRequest(f"{name}: the engine of this model does not have it", metadata={"param": name})
    body: _ChatBody | _CompletionBody
    prompt: Prompt
    try:
        if call is OpenAICall.CHAT_COMPLETION:
            body = _ChatBody.model_validate(document)
        else:
            body = _CompletionBody.model_validate(document)
    except ValidationError as error:
        raise _from_validation(error) from error
    if isinstance(body, _ChatBody):
        prompt, sampling = _conversation(body), _chat_sampling(body)
    else:
        max_tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        prompt, sampling = _completion_prompt(body), _sampling(body, max_tokens, body.logprobs)
    check_sampling(sampling, vocabulary_size=vocabulary_size, prefix="")
    if isinstance(prompt, TokenIds):
        for token_id in prompt.ids:
            if not 0 <= token_id < vocabulary_size:
                raise InvalidRequest(
                    f"prompt: {token_id} is not in the model's vocabulary", metadata={"param": "prompt"}
                )
    has_usage = body.stream_options is not None and body.stream_options.include_usage is True
    return OpenAIRequest(prompt, sampling, body.stream is True, has_usage)


def field_name(location: Sequence[int | str]) -> str:
    """Returns the name of a field as a caller knows it, from the location of one of pydantic's errors."""
    parts = [str(part) for part in location if isinstance(part, int) or not _INTERNAL_MARKS & set(part)]
    return ".".join(part for part in parts if part not in _TYPE_NAMES)


def _conversation(body: _ChatBody) -> Conversation:
    if not body.messages:
        raise InvalidRequest("messages: at least one", metadata={"param": "messages"})
    turns = []
    for message in body.messages:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        # Templates know the older name of this role.
        role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, text, message.name or ""))
    return Conversation(tuple(turns), body.chat_template_kwargs or {})


def _completion_prompt(body: _CompletionBody) -> Prompt:
    if isinstance(body.prompt, str):
        return Text(body.prompt)
    if not body.prompt:
        raise InvalidRequest("prompt: required", metadata={"param": "prompt"})
    first = body.prompt[0]
    if isinstance(first, int):
        return TokenIds(tuple(int(token_id) for token_id in body.prompt))
    if len(body.prompt) > 1:
        raise InvalidRequest("prompt: the engine of this model takes one at a time", metadata={"param": "prompt"})
    return Text(first)


def _chat_sampling(body: _ChatBody) -> Sampling:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _sampling(body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None)


def _sampling(body: _Body, max_tokens: int | None, logprobs: int | None) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        n=1 if body.n is None else body.n,
    )


def _from_validation(error: ValidationError) -> InvalidRequest:
    entries = error.errors(include_url=False, include_input=False)[:_REPORTED_ERRORS]
    lines = [f"{field_name(entry['loc'])}: {entry['msg']}" for entry in entries]
    return InvalidRequest("; ".join(dict.fromkeys(lines)), metadata={"param": field_name(entries[0]["loc"])})
