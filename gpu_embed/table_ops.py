"""The gpu_embed::table_batched_embedding* operators: `bag_ops` for many tables in one buffer.

The output is linear in the buffer W and in the per-sample weights p, so three operators give each other's
derivatives:

    table_batched_embedding                          F(W, p) -> output [B, sum D], or [N, D] without pooling
    table_batched_embedding_dense_backward           G(g, p) -> gradient of the buffer
    table_batched_embedding_sample_weights_backward  P(g, W) -> grad_per_sample_weights [N]
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, bounds, ops
from .bag_ops import register_bilinear
from .bags import check_offsets
from .tables import TableBatch, TableShape

# What a `TableBatch` holds but for its ids and offsets, which come first, as in every operator here.
_BATCH = (
    "Tensor indices, Tensor offsets, Tensor fields, Tensor table_of_column, "
    "SymInt num_rows, SymInt widest, SymInt dim_divisor, bool mean, bool pooled"
)
_library = torch.library.Library("gpu_embed", "FRAGMENT")
_library.define(
    f"table_batched_embedding(Tensor weight, Tensor? per_sample_weights, {_BATCH}, bool zero_padding, "
    "bool sparse) -> Tensor"
)
_library.define(
    "table_batched_embedding_dense_backward(Tensor grad_output, Tensor? per_sample_weights, "
    f"{_BATCH}, SymInt weight_length) -> Tensor"
)
_library.define(
    "table_batched_embedding_sample_weights_backward(Tensor grad_output, Tensor weight, "
    f"{_BATCH}) -> Tensor"
)
table_batched_embedding = torch.ops.gpu_embed.table_batched_embedding.default
table_batched_embedding_dense_backward = (
    torch.ops.gpu_embed.table_batched_embedding_dense_backward.default
)
table_batched_embedding_sample_weights_backward = (
    torch.ops.gpu_embed.table_batched_embedding_sample_weights_backward.default
)


def _batch(
    indices: Tensor, offsets: Tensor, fields: Tensor, table_of_column: Tensor, *shape: Any
) -> TableBatch:
    return TableBatch(
        indices.contiguous(), offsets.contiguous(), fields, table_of_column, TableShape(*shape)
    )


# Kernels: what runs below autograd, on every device.


def _table_batched_embedding(
    weight: Tensor, per_sample_weights: Tensor | None, *batch_and_flags: Any
) -> Tensor:
    *arguments, zero_padding, _ = batch_and_flags
    batch = _batch(*arguments)
    device = weight.device
    bounds.raise_pending(device)
    if device.type == "cpu":
        check_offsets(batch.offsets, batch.indices)
    if batch.indices.numel() == 0 or batch.bags_per_table == 0:
        return _output_like(weight, batch).zero_()
    record = bounds.record_for(device)
    output = backends.select(device).table_batched_embedding(
        weight.contiguous(), _adjacent(per_sample_weights), batch, zero_padding, record
    )
    if record is not None:
        record.finish_lookup(batch.indices)
    return output


def _table_batched_embedding_dense_backward(
    grad_output: Tensor, per_sample_weights: Tensor | None, *batch_and_length: Any
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    *arguments, weight_length = batch_and_length
    batch = _batch(*arguments)
    shape = batch.buffer_shape(weight_length)
    if grad_output.numel() == 0 or batch.bags.num_bags == 0 or batch.shape.num_rows == 0:
        return grad_output.new_zeros(shape)
    return backends.select(grad_output.device).table_batched_embedding_dense_backward(
        grad_output, _adjacent(per_sample_weights), batch, shape
    )


def _table_batched_embedding_sample_weights_backward(
    grad_output: Tensor, weight: Tensor, *arguments: Any
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    batch = _batch(*arguments)
    if grad_output.numel() == 0 or weight.numel() == 0 or batch.indices.numel() == 0:
        return grad_output.new_zeros(batch.indices.shape)
    return backends.select(grad_output.device).table_batched_embedding_sample_weights_backward(
        grad_output, weight.contiguous(), batch
    )


def _adjacent(per_sample_weights: Tensor | None) -> Tensor | None:
    return None if per_sample_weights is None else per_sample_weights.contiguous()


def _output_like(weight: Tensor, batch: TableBatch) -> Tensor:
    """An output's shape and the table's dtype, with whatever is in memory."""
    if batch.shape.pooled:
        return weight.new_empty((batch.bags_per_table, batch.width))
    return weight.new_empty((batch.indices.shape[0], batch.shape.widest))


# Shapes without data.


def _table_batched_embedding_fake(
    weight: Tensor, per_sample_weights: Tensor | None, *batch_and_flags: Any
) -> Tensor:
    *arguments, _, _ = batch_and_flags
    return _output_like(weight, _batch(*arguments))


def _table_batched_embedding_dense_backward_fake(
    grad_output: Tensor, per_sample_weights: Tensor | None, *batch_and_length: Any
) -> Tensor:
    *arguments, weight_length = batch_and_length
    return grad_output.new_empty(_batch(*arguments).buffer_shape(weight_length))


def _table_batched_embedding_sample_weights_backward_fake(
    grad_output: Tensor, weight: Tensor, indices: Tensor, *arguments: Any
) -> Tensor:
    return grad_output.new_empty(indices.shape)


for _name, _kernel, _fake in (
    ("table_batched_embedding", _table_batched_embedding, _table_batched_embedding_fake),
    (
        "table_batched_embedding_dense_backward",
        _table_batched_embedding_dense_backward,
        _table_batched_embedding_dense_backward_fake,
    ),
    (
        "table_batched_embedding_sample_weights_backward",
        _table_batched_embedding_sample_weights_backward,
        _table_batched_embedding_sample_weights_backward_fake,
    ),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gpu_embed::{_name}", _fake, lib=_library)


# Gradients.


def _by_weight(
    grad: Tensor, weight_length: int, per_sample_weights: Tensor | None, *batch_and_flags: Any
) -> Tensor:
    *arguments, _zero_padding, sparse = batch_and_flags
    if sparse:
        return _sparse_gradient(grad, per_sample_weights, _batch(*arguments))
    return call_table_batched_embedding_dense_backward(
        grad, per_sample_weights, *arguments, weight_length
    )


def _by_sample_weights(grad: Tensor, _: int, weight: Tensor, *batch_and_flags: Any) -> Tensor:
    *arguments, _zero_padding, _sparse = batch_and_flags
    return call_table_batched_embedding_sample_weights_backward(grad, weight, *arguments)


def _dense_backward_by_grad(
    grad: Tensor, _: int, per_sample_weights: Tensor | None, *batch_and_length: Any
) -> Tensor:
    *arguments, _length = batch_and_length
    return call_table_batched_embedding(grad, per_sample_weights, *arguments, True, False)


def _dense_backward_by_sample_weights(
    grad: Tensor, _: int, grad_output: Tensor, *batch_and_length: Any
) -> Tensor:
    *arguments, _length = batch_and_length
    return call_table_batched_embedding_sample_weights_backward(grad_output, grad, *arguments)


def _sample_weights_backward_by_grad(
    grad: Tensor, _: int, weight: Tensor, *arguments: Any
) -> Tensor:
    return call_table_batched_embedding(weight, grad, *arguments, True, False)


def _sample_weights_backward_by_weight(
    grad: Tensor, weight_length: int, grad_output: Tensor, *arguments: Any
) -> Tensor:
    return call_table_batched_embedding_dense_backward(grad_output, grad, *arguments, weight_length)


def _sparse_gradient(
    grad_output: Tensor, per_sample_weights: Tensor | None, batch: TableBatch
) -> Tensor:
    """A COO gradient of the buffer [sum V, D]: one entry an id, numbered among the rows of all tables."""
    places = batch.places()
    rows = torch.where(places.counted, places.row, -1)
    values = grad_output
    if batch.shape.pooled:
        bag = places.bag.clamp(min=0)
        # Bag b of table t is row b * T + t of [B * T, D].
        source = (bag - places.table * batch.bags_per_table) * batch.num_tables + places.table
        values = grad_output.reshape(-1, batch.shape.widest)[source]
        if batch.shape.mean:
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            values = (wide / batch.bag_sizes(places)[bag][:, None]).to(values.dtype)
    if per_sample_weights is not None:
        values = values * per_sample_weights[:, None]
    return ops.sparse_gradient(values, rows, batch.shape.num_rows, -1, False)


call_table_batched_embedding: Callable[..., Tensor] = register_bilinear(
    table_batched_embedding, _table_batched_embedding, _by_weight, _by_sample_weights
)
call_table_batched_embedding_dense_backward: Callable[..., Tensor] = register_bilinear(
    table_batched_embedding_dense_backward,
    _table_batched_embedding_dense_backward,
    _dense_backward_by_grad,
    _dense_backward_by_sample_weights,
)
call_table_batched_embedding_sample_weights_backward: Callable[..., Tensor] = register_bilinear(
    table_batched_embedding_sample_weights_backward,
    _table_batched_embedding_sample_weights_backward,
    _sample_weights_backward_by_grad,
    _sample_weights_backward_by_weight,
)
