"""Losses of KV caches, from and to the contract's words."""

from helios.api.fleet.v1 import types_pb2 as types
from helios.worker.replica.kv_losses import Loss, Losses


def losses_to_proto(losses: Losses) -> types.KvCacheNews:
    """Returns the message of losses."""
    return types.KvCacheNews(
        sequence=losses.sequence,
        after=losses.after,
        losses=[
            types.PromptLoss(request_id=loss.request_id, kept_tokens=loss.kept_tokens, prompt_tokens=loss.prompt_tokens)
            for loss in losses.losses
        ],
    )


def losses_from_proto(message: types.KvCacheNews) -> Losses:
    """Returns losses."""
    losses = tuple(Loss(loss.request_id, loss.kept_tokens, loss.prompt_tokens) for loss in message.losses)
    return Losses(message.sequence, message.after, losses)
