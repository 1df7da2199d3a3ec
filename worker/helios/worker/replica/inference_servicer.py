"""InferenceService: the typed twin of OpenAIService, on the engine itself. Protos end here."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from google.protobuf import json_format

from helios.api.inference.v1 import inference_service_pb2 as pb
from helios.api.inference.v1 import inference_service_pb2_grpc
from helios.mesh.errors import InvalidRequest
from helios.worker.replica.continuation import only_new
from helios.worker.replica.engine import (
    Conversation,
    Engine,
    FinishReason,
    Logprob,
    Meter,
    Piece,
    Prompt,
    Sampling,
    Text,
    TokenIds,
    TokenLogprobs,
    Turn,
)
from helios.worker.replica.gate import CallGate
from helios.worker.replica.ready import ReadyTogether
from helios.worker.replica.sampling import check_sampling

_ROLES: Final = {
    pb.ChatMessage.ROLE_SYSTEM: "system",
    pb.ChatMessage.ROLE_USER: "user",
    pb.ChatMessage.ROLE_ASSISTANT: "assistant",
    pb.ChatMessage.ROLE_TOOL: "tool",
}
_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORTED,
}
_OPTIONAL_SAMPLING: Final[tuple[Any, ...]] = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
)


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Handlers are coroutines that write to the context: a client's cancel then reaches the engine's wait directly."""

    def __init__(self, engine: Engine, gate: CallGate, *, model: str, revision: str) -> None:
        """``model`` is the model's own name; with ``revision`` it goes into every ``finished``."""
        self._engine = engine
        self._gate = gate
        self._model = model
        self._revision = revision

    async def Chat(self, request: pb.ChatRequest, context: Any) -> None:  # type: ignore[override]
        """Answers a conversation."""
        with self._gate.admit(context, "chat") as call:
            self._gate.check_model(request.model, call)
            arguments = json_format.MessageToDict(request.template_arguments)
            prompt = conversation_from_proto(request.messages, arguments)
            sampling = self._sampling(request.sampling, request.model)
            await self._generate(prompt, sampling, call.meter, context, _chat_response)

    async def Complete(self, request: pb.CompleteRequest, context: Any) -> None:  # type: ignore[override]
        """Continues a prompt."""
        with self._gate.admit(context, "text_completion") as call:
            self._gate.check_model(request.model, call)
            prompt = self._completion_prompt(request)
            await self._generate(
                prompt, self._sampling(request.sampling, request.model), call.meter, context, _complete_response
            )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Tokenizes."""
        with self._gate.admit(context, "tokenize") as call:
            self._gate.check_model(request.model, call)
            prompt: Prompt
            match request.WhichOneof("input"):
                case "text":
                    prompt = Text(
                        request.text, not request.HasField("add_special_tokens") or request.add_special_tokens
                    )
                case "conversation":
                    prompt = conversation_from_proto(request.conversation.messages, {})
                case _:
                    raise _invalid("input", "required: text or conversation")
            tokenized = await self._engine.tokenize(prompt)
            return pb.TokenizeResponse(
                token_ids=tokenized.token_ids,
                tokens=tokenized.tokens,
                max_context_tokens=self._engine.facts.max_context_tokens,
            )

    async def _generate(
        self, prompt: Prompt, sampling: Sampling, meter: Meter, context: Any, wrap: Callable[..., Any]
    ) -> None:
        ends: dict[int, pb.ChoiceEnd] = {}
        generated = only_new(self._engine.generate(prompt, sampling, meter))
        async with contextlib.aclosing(ReadyTogether(generated)) as batches:
            async for batch in batches:
                for piece in (piece for pieces in batch for piece in pieces):
                    if piece.text or piece.token_ids:
                        await context.write(wrap(delta=delta_to_proto(piece)))
                    if piece.finish is not None:
                        ends[piece.choice_index] = end_to_proto(piece, piece.finish)
        finished = pb.Finished(
            choices=[ends[index] for index in sorted(ends)],
            usage=pb.Usage(
                prompt_tokens=meter.prompt_tokens,
                completion_tokens=meter.completion_tokens,
                cached_prompt_tokens=meter.cached_prompt_tokens,
            ),
            model=self._model,
            revision=self._revision,
        )
        await context.write(wrap(finished=finished))

    def _sampling(self, parameters: pb.SamplingParameters, model: str) -> Sampling:
        sampling = replace(sampling_from_proto(parameters), adapter=self._gate.adapter_of(model))
        check_sampling(sampling, vocabulary_size=self._engine.facts.vocabulary_size)
        return sampling

    def _completion_prompt(self, request: pb.CompleteRequest) -> Prompt:
        match request.WhichOneof("prompt"):
            case "text":
                return Text(request.text)
            case "token_ids":
                ids = tuple(request.token_ids.ids)
                if not ids:
                    raise _invalid("token_ids.ids", "at least one")
                if max(ids) >= self._engine.facts.vocabulary_size:
                    raise _invalid("token_ids.ids", f"{max(ids)} is not in the model's vocabulary")
                return TokenIds(ids)
            case _:
                raise _invalid("prompt", "required: text or token_ids")


def conversation_from_proto(messages: Sequence[pb.ChatMessage], arguments: dict[str, Any]) -> Conversation:
    """Reads the messages of a conversation. Raises InvalidRequest for none, or for one without a role."""
    if not messages:
        raise _invalid("messages", "at least one")
    turns = []
    for index, message in enumerate(messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise _invalid(f"messages[{index}].role", "required")
        turns.append(Turn(role, message.content, message.name))
    return Conversation(tuple(turns), arguments)


def sampling_from_proto(parameters: pb.SamplingParameters) -> Sampling:
    """Reads sampling parameters; what is not set stays None. Ranges are checked by ``check_sampling``."""
    values = {name: getattr(parameters, name) for name in _OPTIONAL_SAMPLING if parameters.HasField(name)}
    return Sampling(
        **values,
        stop=tuple(parameters.stop),
        stop_token_ids=tuple(parameters.stop_token_ids),
        n=parameters.n if parameters.HasField("n") else 1,
    )


def delta_to_proto(piece: Piece) -> pb.Delta:
    """Returns the delta of a piece."""
    return pb.Delta(
        choice_index=piece.choice_index,
        output_index=piece.output_index,
        text=piece.text,
        token_ids=piece.token_ids,
        logprobs=[_logprobs_to_proto(entry) for entry in piece.logprobs],
    )


def end_to_proto(piece: Piece, reason: FinishReason) -> pb.ChoiceEnd:
    """Returns how an answer ended."""
    end = pb.ChoiceEnd(choice_index=piece.choice_index, reason=_REASONS[reason])
    if isinstance(piece.stop, str):
        end.stop_text = piece.stop
    elif piece.stop is not None:
        end.stop_token_id = piece.stop
    return end


def _logprobs_to_proto(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(chosen=_logprob_to_proto(entry.chosen), top=[_logprob_to_proto(top) for top in entry.top])


def _logprob_to_proto(entry: Logprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=entry.token_id, text=entry.text, logprob=entry.logprob)


def _chat_response(**event: Any) -> pb.ChatResponse:
    return pb.ChatResponse(**event)


def _complete_response(**event: Any) -> pb.CompleteResponse:
    return pb.CompleteResponse(**event)


def _invalid(field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {problem}", metadata={"param": field})
