"""LoRA's two products on a CPU: in place of vLLM's, which give requests without an adapter somebody else's.

vLLM's plain PyTorch version takes each token's matrix by its index, and an index of -1, which stands for "no adapter",
takes the last one there is: a request for the model itself that shares a step with one for an adapter is answered with
that adapter. It also copies the matrices once for each token, 100 MB a layer for a prompt of a thousand tokens. Here
each adapter's matrix is multiplied once with all tokens, and each token takes the product that is its own.

Needs no vLLM. No branch depends on a tensor's values, so that a compiled model can hold it.
"""

from collections.abc import Callable
from typing import Any

import torch


def shrink(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
) -> None:
    """Writes ``scaling * inputs @ weights[index]ᵀ`` to the first columns of ``output``; 0 where there is no adapter.

    Args:
        inputs: [tokens, width].
        weights: [adapters, 1, rank, width], or without the 1.
        output: [tokens, at least rank]; the products are computed in its type.
        indices: [tokens]; which adapter, negative: none.
        scaling: Factor of all products.
    """
    output[:, : weights.shape[-2]] = scaling * _products(inputs, weights, indices, output.dtype)


def expand(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor, add_inputs: bool = True
) -> None:
    """Adds ``inputs @ weights[index]ᵀ`` to the first columns of ``output``; nothing where there is no adapter.

    The two may differ in padding. Without ``add_inputs`` they are written.
    """
    width = min(output.shape[1], weights.shape[-2])
    expand_slice(inputs, weights[..., :width, :], output, indices, 0, width, add_inputs)


def expand_slice(  # noqa: PLR0917  vLLM's order
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """As ``expand``, to the columns of ``output`` from ``slice_offset`` on."""
    products = _products(inputs, weights, indices, output.dtype)
    columns = output[:, slice_offset : slice_offset + slice_size]
    if add_inputs:
        columns += products
    else:
        columns[:] = products


def by_sequence(kernel: Callable[..., None]) -> Callable[..., None]:
    """Returns a kernel that is given an index and a length for each sequence, as vLLM gives them in a prefill."""

    def of_sequences(inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, *said: Any) -> None:
        # Where each begins, its length, its index; how many, the longest, tokens in all; then the kernel's own.
        _, lengths, indices, _, _, _, *more = said
        kernel(inputs, weights, output, torch.repeat_interleave(indices, lengths), *more)

    return of_sequences


def _products(inputs: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    matrices = weights.squeeze(1) if weights.dim() == 4 else weights
    inputs, own = inputs.to(dtype), indices.unsqueeze(1)
    total = torch.zeros((inputs.shape[0], matrices.shape[1]), dtype=dtype, device=inputs.device)
    for index in range(matrices.shape[0]):
        total = torch.where(own == index, inputs @ matrices[index].to(dtype).T, total)
    return total
