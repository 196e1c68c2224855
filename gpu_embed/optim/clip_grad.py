"""Clipping by norm, where torch's own function does not take sparse gradients."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from ..tables.entries import number_rows
from ..tables.gradient import TableGradient
from .saved_state import sharding_of


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for gradients of which some or all are sparse, or are `TableGradient`s.

    The norm is that of the gradients as they would be dense: the entries of a row are summed first. Their sums
    take as much memory as the gradient's values (of a `TableGradient`, as if all its rows had the length of the
    longest), whatever the table's height, and nothing waits for the GPU.

    Of a `distributed.ShardedEmbedding` each rank has its rows, and the norm is that of all of them: all its ranks call
    this, with the same parameters.

    Args:
        parameters: whose gradients to scale, in place.
        max_norm: what their norm, taken together, is brought down to.
        norm_type: the p of that norm.
        error_if_nonfinite: raise RuntimeError if the norm is infinite or NaN, which waits for the GPU.

    Returns:
        The norm before, a tensor of one element.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded: dict[Any, list[Tensor]] = {}
    whole = []
    for parameter in parameters:
        sharding = sharding_of(parameter)
        if sharding is not None:
            # A rank without a gradient takes part all the same.
            sharded.setdefault(sharding.group, []).append(parameter)
        elif parameter.grad is not None:
            whole.append(_row_sums(parameter.grad))
    whole += [_norm_of_ranks(own, norm_type, group) for group, own in sharded.items()]
    total_norm = torch.nn.utils.get_total_norm(whole, norm_type, error_if_nonfinite)
    scale = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    for grad in grads:
        (grad._values() if grad.is_sparse else grad).mul_(scale.to(grad.device))
    return total_norm


def _norm_of_ranks(parameters: list[Tensor], norm_type: float, group: Any) -> Tensor:
    """The norm of the gradients of all rows that the ranks of a group have."""
    own = [_row_sums(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(own, norm_type).to(parameters[0].device)
    of_ranks = [torch.empty_like(norm) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, norm, group)
    return torch.linalg.vector_norm(torch.stack(of_ranks), norm_type)


def _row_sums(grad: Tensor) -> Tensor:
    """The sum of each row's entries, and rows of zeros, at most as many as there are entries; or all there is."""
    if isinstance(grad, TableGradient):
        entries = grad.entries
        ids, values = torch.where(entries.in_table(), entries.rows, -1), entries.row_values()
    elif not grad.is_sparse:
        return grad
    elif grad.is_coalesced():
        return grad._values()
    else:
        ids, values = grad._indices()[0], grad._values()
    if values.numel() == 0:
        return values
    # The rows of the table are numbered anew, in the order of their ids.
    return backends.select(grad.device).embedding_dense_backward(
        values, number_rows(ids), len(ids), -1, False
    )
