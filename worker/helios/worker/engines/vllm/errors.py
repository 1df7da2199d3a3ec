"""vLLM's errors, and those of its request models, as Helios errors: one table each way in."""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from helios.mesh.errors import (
    Bug,
    ContextLengthExceeded,
    HeliosError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    ReplicaLost,
    Unsupported,
)
from helios.worker.engines.openai_requests import field_name
from helios.worker.engines.vllm import compat

# What vLLM's serving code raises for a request it can't take: its HTTP server answers plain ones with 400 too.
REQUEST_ERRORS: Final = (
    compat.VLLMError,
    compat.EngineDeadError,
    ValidationError,
    ValueError,
    TypeError,
    OverflowError,
)

_CONTEXT_MESSAGES: Final = ("maximum context length", "longer than the maximum model length", "max_model_len")
_BY_STATUS: Final[Mapping[int, type[HeliosError]]] = {
    404: ModelNotFound,
    500: Bug,
    501: Unsupported,
    503: Overloaded,
}
_REPORTED_ERRORS: Final = 3
# vLLM names its own flag where a model has no parser, which is none of a caller's.
_TOOL_PARSER_FLAG: Final = "--tool-call-parser"


def from_exception(error: Exception) -> HeliosError:
    """Returns what a caller is told of an exception out of vLLM's serving code."""
    if isinstance(error, HeliosError):
        return error
    if isinstance(error, ValidationError):
        return from_validation(error)
    if isinstance(error, compat.EngineDeadError):
        return ReplicaLost("the engine died", retry_after_seconds=1.0)
    if isinstance(error, compat.VLLMValidationError):
        return _invalid(str(error.args[0]), error.parameter)
    if isinstance(error, compat.VLLMNotFoundError):
        return ModelNotFound(str(error))
    if isinstance(error, compat.GracefulHTTPError | compat.RetryableRequestError):
        return Overloaded(str(error), retry_after_seconds=1.0)
    if isinstance(error, compat.VLLMClientError):
        return _invalid(str(error), None)
    if isinstance(error, compat.VLLMError):
        # Not Unavailable: what broke here (a grammar without any sentence, say) would be tried on every other replica.
        return Bug(str(error))
    if isinstance(error, ValueError | TypeError | OverflowError):
        return _invalid(str(error), None)
    return Bug(f"the engine failed ({type(error).__name__})")


def from_response(response: Any, model: str) -> HeliosError:
    """Returns the error that an ErrorResponse of vLLM stands for; ``model`` is whom it was asked of."""
    if _TOOL_PARSER_FLAG in response.error.message:
        return InvalidRequest(
            f"{model} is not set up for tool calls: say which parser reads them from its answers, "
            f"with `helios models set {model} --set tool_call_parser=hermes` (or another of vLLM's parsers)",
            reason="TOOL_CALLS_NOT_SET_UP",
            metadata={"param": "tool_choice"},
        )
    return from_document(response.error.model_dump())


def from_document(document: Mapping[str, Any]) -> HeliosError:
    """Returns the error that the ``error`` object of one of vLLM's bodies stands for."""
    message, code, param = str(document.get("message", "")), document.get("code", 500), document.get("param")
    kind = _BY_STATUS.get(code)
    if kind is None:
        return _invalid(message, param) if code < 500 else Bug(message)
    return kind(message, metadata=_param(param))


def from_validation(error: ValidationError) -> HeliosError:
    """Returns an InvalidRequest that names the first offending field, and says what is wrong with the first few."""
    lines, first = [], None
    for entry in error.errors(include_url=False, include_input=False)[:_REPORTED_ERRORS]:
        cause = entry.get("ctx", {}).get("error")
        if isinstance(cause, compat.VLLMValidationError):
            field, text = cause.parameter or "", str(cause.args[0])
        else:
            field, text = field_name(entry["loc"]), entry["msg"]
        first = first or field
        lines.append(f"{field}: {text}" if field else text)
    return _invalid("; ".join(dict.fromkeys(lines)), first)


def _invalid(message: str, param: str | None) -> InvalidRequest:
    kind = ContextLengthExceeded if any(text in message for text in _CONTEXT_MESSAGES) else InvalidRequest
    return kind(message, metadata=_param(param))


def _param(param: str | None) -> dict[str, str]:
    return {"param": param} if param else {}
