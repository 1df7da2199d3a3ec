"""What requests and operators are told that the proxy refuses: errors with their reasons, and what to do. Pure."""

from __future__ import annotations

from helios.mesh.errors import HeliosError, ModelNotFound, NoReadyReplica, PreconditionFailed
from helios.proxy.activation import machine
from helios.proxy.catalogue import ModelEntry, shown


def model_not_found(model: str) -> ModelNotFound:
    """The answer to a request that names no model."""
    message = f"the model '{shown(model)}' does not exist; GET /v1/models lists the models"
    return ModelNotFound(message, metadata={"model": shown(model), "param": "model"})


def start_error(model: str, reason: str, message: str, retry_after_seconds: float) -> HeliosError:
    """The answer to requests that waited for a start that will not be."""
    if machine.is_permanent(reason):
        # 400 and FAILED_PRECONDITION, which no client repeats by itself: a next try would fail alike.
        return PreconditionFailed(
            f"the model '{model}' can't be started: {message.removeprefix(f'{reason}: ')}",
            reason=reason,
            metadata={"model": model, "cause": reason, "param": "model"},
        )
    is_capacity = reason in ("NO_CAPACITY", "NO_WORKER")
    return NoReadyReplica(
        f"the model '{model}' can't be started now: {message}",
        reason=reason if is_capacity else None,
        metadata={"model": model, "cause": reason},
        retry_after_seconds=retry_after_seconds,
    )


def check_unpinned(entry: ModelEntry) -> None:
    """Refuses to take a model's replicas away where its policy would start them anew.

    Raises:
        PreconditionFailed: MODEL_PINNED.
    """
    if entry.min_replicas:
        raise PreconditionFailed(
            f"the model '{entry.name}' keeps {entry.min_replicas} replica(s); scale it to 0 first",
            reason="MODEL_PINNED",
            metadata={"model": entry.name, "min_replicas": str(entry.min_replicas)},
        )
