"""A request whose prompt another replica computes: its arguments for AsyncLLM.generate, with where the KV cache is."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from helios.worker.replica.engine import TransferParameters


async def with_transfer(
    prefill: Callable[[Sequence[int]], Awaitable[TransferParameters | None]],
    block_tokens: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Has the prompt computed elsewhere where that helps; returns the positional arguments to go on with.

    Less than a block does not travel; a prompt's own log probabilities and an adapter's KV cache are not elsewhere, and
    several answers can't take one transfer.
    """
    prompt, parameters, *others = args
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    is_plain = parameters.n == 1 and parameters.prompt_logprobs is None and kwargs.get("lora_request") is None
    if not token_ids or len(token_ids) <= block_tokens or not is_plain:
        return args
    transfer = await prefill(token_ids)
    if transfer is None:
        return args
    parameters = parameters.clone()
    parameters.extra_args = {**(parameters.extra_args or {}), "kv_transfer_params": dict(transfer)}
    return (prompt, parameters, *others)
