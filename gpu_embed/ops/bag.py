"""The gpu_embed::embedding_bag* operators: schemas, fake kernels, gradients and vmap rules.

With F(W, p) the bags of a table W under per-sample weights p (all ones where there are none), the product of F
with a gradient g is linear in each of g, W and p. So the derivatives of each of three operators are the
other two, and they differentiate any number of times, in both directions:

    embedding_bag                          F(W, p) -> output [B, D]
    embedding_bag_dense_backward           G(g, p) -> grad_weight [V, D]
    embedding_bag_sample_weights_backward  P(g, W) -> grad_per_sample_weights, the ids' shape

`embedding_bag_max` gives the largest values and where in the table they lie. From there on it is a lookup of
single elements, so its gradient is `gpu_embed::embedding_dense_backward` of a table with one column.

A shard is as in `lookup`: W is some rows of a larger table. F, G and P are then those rows' part of it. Of maxima there
is no such part; `embedding_bag_shard_max` says the largest of the shard's rows and their positions, and
`functional.dtensor` compares them over the ranks.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, bounds
from ..bags import Bags, check_offsets, count_bags, make_bags
from ..dtypes import accumulation
from ..shard import Shard, table_rows
from .autograd import register_argmax, register_loop, register_multilinear
from .library import define
from .lookup import (
    _embedding_dense_backward,
    call_embedding_dense_backward,
    call_embedding_dense_double_backward,
    sparse_gradient,
)

# Dispatcher kernels (CompositeExplicitAutograd). Ids are [N] with offsets, or [B, L] without.


def _checked_bags(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Bags:
    if offsets is not None and offsets.device.type == "cpu":
        check_offsets(offsets, indices)
    return make_bags(indices, offsets, include_last_offset)


def _embedding_bag(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    bags = _checked_bags(indices, offsets, include_last_offset)
    if indices.numel() == 0 or bags.num_bags == 0:
        bounds.raise_pending(weight.device)
        return weight.new_empty((bags.num_bags, weight.shape[1])).zero_()
    if weight.shape[1] == 0:
        num_embeddings = weight.shape[0] if shard is None else shard[1]
        compute = partial(_no_columns, weight, bags, num_embeddings)
        return bounds.looked_up(weight.device, indices, compute)
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.contiguous().view(-1)
    compute_bag = backends.select(weight.device).embedding_bag
    compute = partial(compute_bag, weight, per_sample_weights, bags, padding_idx, mode)
    if shard is not None:
        compute = partial(compute, shard=Shard(*shard))
    return bounds.looked_up(weight.device, indices, compute)


def _no_columns(
    weight: Tensor, bags: Bags, num_embeddings: int, record: bounds.BoundsRecord | None
) -> Tensor:
    """Bags of a table without columns."""
    if record is not None:
        record.write_bags(bags, num_embeddings)
    return weight.new_empty((bags.num_bags, 0))


def _embedding_bag_max(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    with_argmax: bool,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    bags = _checked_bags(indices, offsets, include_last_offset)
    shape = (bags.num_bags, weight.shape[1])
    if indices.numel() and bags.num_bags:
        if weight.shape[1]:
            compute_bag_max = backends.select(weight.device).embedding_bag_max
            compute = partial(compute_bag_max, weight, bags, padding_idx, with_argmax)
            if shard is not None:
                compute = partial(compute, shard=shard)
            return bounds.looked_up(weight.device, indices, compute)
        nothing = partial(_no_columns, weight, bags, table_rows(weight.shape[0], shard))
        bounds.looked_up(weight.device, indices, nothing)
    else:
        bounds.raise_pending(weight.device)
    max_elements = weight.new_full(shape if with_argmax else (0,), -1, dtype=torch.int64)
    return weight.new_empty(shape).zero_(), max_elements


def _embedding_bag_shard_max(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    shard: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return _embedding_bag_max(
        weight, indices, offsets, include_last_offset, padding_idx, True, Shard(*shard)
    )


def _embedding_bag_dense_backward(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    num_embeddings: int,
    shard: Sequence[int] | None = None,
    into: Tensor | None = None,
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    bags = make_bags(indices, offsets, include_last_offset)
    if grad_output.numel() == 0 or num_embeddings == 0 or bags.indices.numel() == 0:
        if into is not None:
            return into
        return grad_output.new_zeros((num_embeddings, grad_output.shape[1]))
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.contiguous().view(-1)
    return backends.select(grad_output.device).embedding_bag_dense_backward(
        grad_output,
        per_sample_weights,
        bags,
        num_embeddings,
        padding_idx,
        mode,
        scale_grad_by_freq,
        into,
        None if shard is None else Shard(*shard),
    )


def _embedding_bag_sample_weights_backward(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    shard: Sequence[int] | None = None,
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    bags = make_bags(indices, offsets, include_last_offset)
    if grad_output.numel() == 0 or weight.numel() == 0 or bags.indices.numel() == 0:
        return grad_output.new_zeros(indices.shape)
    grad = backends.select(grad_output.device).embedding_bag_sample_weights_backward(
        grad_output, weight, bags, padding_idx, None if shard is None else Shard(*shard)
    )
    return grad.view(indices.shape)


def _embedding_counts(
    indices: Tensor, num_embeddings: int, shard: Sequence[int] | None = None
) -> Tensor:
    if indices.numel() == 0 or num_embeddings == 0:
        return _embedding_counts_fake(indices, num_embeddings).zero_()
    backend = backends.select(indices.device)
    return backend.embedding_counts(
        indices, num_embeddings, None if shard is None else Shard(*shard)
    )


# Fake kernels.


def _embedding_bag_fake(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    bounds.prepare(weight.device)
    num_bags = count_bags(indices, offsets, include_last_offset)
    return weight.new_empty((num_bags, weight.shape[1]))


def _embedding_bag_dense_backward_fake(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    num_embeddings: int,
    shard: Sequence[int] | None = None,
) -> Tensor:
    return grad_output.new_empty((num_embeddings, grad_output.shape[1]))


def _embedding_bag_sample_weights_backward_fake(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    shard: Sequence[int] | None = None,
) -> Tensor:
    return grad_output.new_empty(indices.shape)


def _embedding_bag_max_fake(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    with_argmax: bool,
) -> tuple[Tensor, Tensor]:
    bounds.prepare(weight.device)
    shape = (count_bags(indices, offsets, include_last_offset), weight.shape[1])
    output = weight.new_empty(shape)
    return output, output.new_empty(shape if with_argmax else (0,), dtype=torch.int64)


def _embedding_bag_shard_max_fake(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    shard: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return _embedding_bag_max_fake(weight, indices, offsets, include_last_offset, padding_idx, True)


def _embedding_counts_fake(
    indices: Tensor, num_embeddings: int, shard: Sequence[int] | None = None
) -> Tensor:
    return indices.new_empty((num_embeddings,), dtype=torch.int32)


# The tensors in front of the ids are those that are differentiated.
embedding_bag = define(
    "embedding_bag(Tensor weight, Tensor? per_sample_weights, Tensor indices, Tensor? offsets, "
    "bool include_last_offset, SymInt padding_idx, str mode, bool scale_grad_by_freq, bool sparse, "
    "SymInt[]? shard=None) -> Tensor",
    _embedding_bag,
    _embedding_bag_fake,
)
embedding_bag_dense_backward = define(
    "embedding_bag_dense_backward(Tensor grad_output, Tensor? per_sample_weights, Tensor indices, "
    "Tensor? offsets, bool include_last_offset, SymInt padding_idx, str mode, "
    "bool scale_grad_by_freq, SymInt num_embeddings, SymInt[]? shard=None) -> Tensor",
    _embedding_bag_dense_backward,
    _embedding_bag_dense_backward_fake,
)
embedding_bag_sample_weights_backward = define(
    "embedding_bag_sample_weights_backward(Tensor grad_output, Tensor weight, Tensor indices, "
    "Tensor? offsets, bool include_last_offset, SymInt padding_idx, SymInt[]? shard=None) -> Tensor",
    _embedding_bag_sample_weights_backward,
    _embedding_bag_sample_weights_backward_fake,
)
embedding_bag_max = define(
    "embedding_bag_max(Tensor weight, Tensor indices, Tensor? offsets, bool include_last_offset, "
    "SymInt padding_idx, bool with_argmax) -> (Tensor, Tensor)",
    _embedding_bag_max,
    _embedding_bag_max_fake,
)
embedding_bag_shard_max = define(
    "embedding_bag_shard_max(Tensor weight, Tensor indices, Tensor? offsets, bool include_last_offset, "
    "SymInt padding_idx, SymInt[] shard) -> (Tensor, Tensor)",
    _embedding_bag_shard_max,
    _embedding_bag_shard_max_fake,
)
embedding_counts = define(
    "embedding_counts(Tensor indices, SymInt num_embeddings, SymInt[]? shard=None) -> Tensor",
    _embedding_counts,
    _embedding_counts_fake,
)


# Gradients of sum and mean.


def _bag_by_weight(
    grad: Tensor,
    num_embeddings: int,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
    into: Tensor | None = None,
) -> Tensor:
    if sparse:
        bags = make_bags(indices, offsets, include_last_offset)
        if shard is not None:
            bags = Shard(*shard).local_bags(bags, num_embeddings, padding_idx)
            padding_idx = num_embeddings
        return _sparse_gradient(
            grad, per_sample_weights, bags, num_embeddings, padding_idx, mode, scale_grad_by_freq
        )
    inputs = (
        grad,
        per_sample_weights,
        indices,
        offsets,
        include_last_offset,
        padding_idx,
        mode,
        scale_grad_by_freq,
        num_embeddings,
        shard,
    )
    if into is not None:
        return _embedding_bag_dense_backward(*inputs, into)
    return call_embedding_bag_dense_backward(*inputs)


def _bag_by_sample_weights(
    grad: Tensor,
    _: int,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    sparse: bool,
    shard: Sequence[int] | None = None,
) -> Tensor:
    return call_embedding_bag_sample_weights_backward(
        grad, weight, indices, offsets, include_last_offset, padding_idx, shard
    )


def _dense_backward_by_grad(
    grad: Tensor,
    _: int,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    num_embeddings: int,
    shard: Sequence[int] | None = None,
) -> Tensor:
    dtype = grad.dtype
    if scale_grad_by_freq:
        grad = _over_counts(grad, indices, offsets, include_last_offset, shard)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.to(grad.dtype)
    return call_embedding_bag(
        grad,
        per_sample_weights,
        indices,
        offsets,
        include_last_offset,
        padding_idx,
        mode,
        False,
        False,
        shard,
    ).to(dtype)


def _dense_backward_by_sample_weights(
    grad: Tensor,
    _: int,
    grad_output: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
    num_embeddings: int,
    shard: Sequence[int] | None = None,
) -> Tensor:
    dtype = grad.dtype
    if scale_grad_by_freq:
        grad = _over_counts(grad, indices, offsets, include_last_offset, shard)
    return call_embedding_bag_sample_weights_backward(
        grad_output.to(grad.dtype), grad, indices, offsets, include_last_offset, padding_idx, shard
    ).to(dtype)


def _sample_weights_backward_by_grad(
    grad: Tensor,
    _: int,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    shard: Sequence[int] | None = None,
) -> Tensor:
    bags = indices, offsets, include_last_offset, padding_idx
    return call_embedding_bag(weight, grad, *bags, "sum", False, False, shard)


def _sample_weights_backward_by_weight(
    grad: Tensor,
    num_embeddings: int,
    grad_output: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    shard: Sequence[int] | None = None,
) -> Tensor:
    bags = indices, offsets, include_last_offset, padding_idx
    return call_embedding_bag_dense_backward(
        grad_output, grad, *bags, "sum", False, num_embeddings, shard
    )


def _over_counts(
    table: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    shard: Sequence[int] | None,
) -> Tensor:
    """Each row over how often its id occurs, in the accumulation dtype."""
    if include_last_offset and offsets is not None:
        positions = torch.arange(indices.numel(), device=indices.device)
        indices = torch.where(positions < offsets[-1], indices.to(torch.int64), -1)
    counts = embedding_counts(indices, table.shape[0], shard).clamp(min=1)[:, None]
    return table.to(accumulation(table.dtype)) / counts


def _sparse_gradient(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    bags: Bags,
    num_embeddings: int,
    padding_idx: int,
    mode: str,
    scale_grad_by_freq: bool,
) -> Tensor:
    """torch's sparse gradient: one entry an id, as `lookup.sparse_gradient` makes them."""
    bag = bags.bag_of()
    ids = torch.where(bag >= 0, bags.indices.to(torch.int64), -1)
    bag = bag.clamp(min=0)
    if mode == "mean":
        sizes = bags.sizes(padding_idx).clamp(min=1)
        wide = grad_output.to(accumulation(grad_output.dtype))
        grad_output = (wide / sizes[:, None]).to(grad_output.dtype)
    # A table without bags has no row to hand on.
    values = (
        grad_output.index_select(0, bag)
        if bags.num_bags
        else grad_output.new_zeros((len(bag), grad_output.shape[1]))
    )
    if per_sample_weights is not None:
        values = values * per_sample_weights.reshape(-1, 1)
    return sparse_gradient(
        values, ids, num_embeddings, padding_idx, scale_grad_by_freq, is_new=True
    )


call_embedding_bag = register_multilinear(
    embedding_bag, _embedding_bag, _bag_by_weight, _bag_by_sample_weights, of_table=True
)
call_embedding_bag_dense_backward = register_multilinear(
    embedding_bag_dense_backward,
    _embedding_bag_dense_backward,
    _dense_backward_by_grad,
    _dense_backward_by_sample_weights,
)
call_embedding_bag_sample_weights_backward = register_multilinear(
    embedding_bag_sample_weights_backward,
    _embedding_bag_sample_weights_backward,
    _sample_weights_backward_by_grad,
    _sample_weights_backward_by_weight,
)


# Gradients of max: with the argmax fixed, a lookup of single elements in a table with one column.


def _max_adjoint(
    grad: Tensor,
    shape: torch.Size,
    max_elements: Tensor,
    *bags: Any,
    into: Tensor | None = None,
) -> Tensor:
    inputs = grad.reshape(-1, 1), max_elements.view(-1), shape.numel(), -1, False
    # The elements of another gradient are no table of one column.
    if into is not None and into.is_contiguous():
        _embedding_dense_backward(*inputs, into=into.view(-1, 1))
        return into
    return call_embedding_dense_backward(*inputs).view(shape)


def at_elements(table: Tensor, elements: Tensor) -> Tensor:
    """The elements of a table at these places, 0 where one is -1, differentiable: a lookup in a table of one column."""
    # Of the operators that look up, the one for which -1 is no error.
    rows = call_embedding_dense_double_backward(
        table.reshape(-1, 1), elements.view(-1), -1, False, None
    )
    return rows.view(elements.shape)


def _at_max(weight: Tensor, max_elements: Tensor, *bags: Any) -> Tensor:
    return at_elements(weight, max_elements)


call_embedding_bag_max = register_argmax(
    embedding_bag_max, _embedding_bag_max, _max_adjoint, _at_max
)
for _op in (
    embedding_bag,
    embedding_bag_dense_backward,
    embedding_bag_sample_weights_backward,
    embedding_bag_max,
    embedding_counts,
):
    register_loop(_op)
