"""The gpu_embed::table_batched_embedding* operators: `ops.bag` for many tables in one buffer.

The output is linear in the buffer W and in the per-sample weights p, so three operators give each other's
derivatives:

    table_batched_embedding                          F(W, p) -> output [B, sum D], or [N, D] without pooling
    table_batched_embedding_dense_backward           G(g, p) -> gradient of the buffer
    table_batched_embedding_sample_weights_backward  P(g, W) -> grad_per_sample_weights [N]

Where tables have mode "max", `table_batched_embedding_max` gives the output, and of each maximum the position that
it is. With these given, the output is linear in W again, so they are an argument of the others, and G is the
gradient.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, bounds
from ..bags import check_offsets
from ..dtypes import accumulation
from ..tables.batch import Places, TableBatch
from ..tables.entries import TableEntries, narrow_positions
from ..tables.gradient import TableGradient
from ..tables.layout import MODES, TableColumn, Tables, TableShape
from .autograd import register_argmax, register_multilinear
from .library import define
from .lookup import sparse_gradient

# A `TableBatch` in a schema; the operator that finds the max_positions has none yet.
_IDS = "Tensor indices, Tensor offsets"
_TABLES = (
    "Tensor fields, Tensor table_of_column, Tensor? trained_fields, "
    "SymInt num_rows, SymInt widest, SymInt dim_divisor, bool mean, bool pooled, "
    "ScalarType? table_dtype, ScalarType? output_dtype"
)
_BATCH = f"{_IDS}, Tensor? max_positions, {_TABLES}"
# The layer's own tensors: they are kept as arguments are, not saved as what the caller might change.
_CONSTANTS = 3


def _batch(
    indices: Tensor,
    offsets: Tensor,
    max_positions: Tensor | None,
    fields: Tensor,
    table_of_column: Tensor,
    trained_fields: Tensor | None,
    *shape: Any,
    trained: bool = False,
) -> TableBatch:
    """The batch that an operator was given.

    Args:
        trained: of the trained tables: the ids of frozen ones name no row, and get no gradient.
    """
    if trained and trained_fields is not None:
        fields = trained_fields
    if max_positions is not None:
        max_positions = max_positions.contiguous()
    of_tables = (fields, table_of_column, TableShape(*shape), max_positions, trained_fields)
    return TableBatch(indices.contiguous(), offsets.contiguous(), *of_tables)


def _packed(
    max_positions: Tensor | None, indices: Tensor, offsets: Tensor, *tables: Any
) -> tuple[Any, ...]:
    """A batch as operators take it."""
    return indices, offsets, max_positions, *tables


def call_table_batched_embedding(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    tables: Tables,
    pooled: bool,
    sparse: bool,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows, or sums, means and maxima, of a batch in these tables."""
    shape = tables.layout.shape(pooled)
    if output_dtype is not None and output_dtype != weight.dtype:
        shape = shape._replace(table_dtype=weight.dtype, output_dtype=output_dtype)
    constants = (tables.fields, tables.table_of_column, tables.trained_fields, *shape)
    if "max" in tables.layout.modes:
        return _call_max(weight, indices, offsets, *constants, sparse)
    return _call(weight, per_sample_weights, indices, offsets, None, *constants, False, sparse)


# Dispatcher kernels (CompositeExplicitAutograd).


def _has_ids(weight: Tensor, batch: TableBatch) -> bool:
    """Whether there is anything to look up; offsets on the CPU are checked."""
    if weight.device.type == "cpu":
        check_offsets(batch.offsets, batch.indices)
    if batch.indices.numel() and batch.bags_per_table:
        return True
    bounds.raise_pending(weight.device)
    return False


def _table_batched_embedding(
    weight: Tensor, per_sample_weights: Tensor | None, *batch_and_flags: Any
) -> Tensor:
    *arguments, zero_padding, _ = batch_and_flags
    batch = _batch(*arguments)
    if not _has_ids(weight, batch):
        return _output_like(weight, batch).zero_()
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.contiguous()
    embedding = backends.select(weight.device).table_batched_embedding
    compute = partial(embedding, weight.contiguous(), per_sample_weights, batch, zero_padding)
    return bounds.looked_up(weight.device, batch.indices, compute)


def _table_batched_embedding_max(weight: Tensor, *batch_and_flags: Any) -> tuple[Tensor, Tensor]:
    *arguments, _, with_argmax = batch_and_flags
    batch = _batch(*_packed(None, *arguments))
    if not _has_ids(weight, batch):
        output = _output_like(weight, batch).zero_()
        return output, _max_positions_like(output, batch, with_argmax).fill_(-1)
    embedding_max = backends.select(weight.device).table_batched_embedding_max
    compute = partial(embedding_max, weight.contiguous(), batch, with_argmax)
    return bounds.looked_up(weight.device, batch.indices, compute)


def _table_batched_embedding_dense_backward(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    *batch_and_length: Any,
    into: Tensor | None = None,
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    *arguments, weight_length = batch_and_length
    batch = _batch(*arguments, trained=True)
    shape = batch.buffer_shape(weight_length)
    if grad_output.numel() == 0 or batch.bags.num_bags == 0 or batch.shape.num_rows == 0:
        zeros = grad_output.new_zeros(shape, dtype=batch.shape.table_dtype)
        return zeros if into is None else into
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.contiguous()
    return backends.select(grad_output.device).table_batched_embedding_dense_backward(
        grad_output, per_sample_weights, batch, shape, into
    )


def _table_batched_embedding_sample_weights_backward(
    grad_output: Tensor, weight: Tensor, *arguments: Any
) -> Tensor:
    bounds.raise_pending(grad_output.device)
    batch = _batch(*arguments)
    if grad_output.numel() == 0 or weight.numel() == 0 or batch.indices.numel() == 0:
        return weight.new_zeros(batch.indices.shape)
    return backends.select(grad_output.device).table_batched_embedding_sample_weights_backward(
        grad_output, weight.contiguous(), batch
    )


def _output_like(weight: Tensor, batch: TableBatch) -> Tensor:
    """An output's shape and dtype, with whatever is in memory."""
    dtype = batch.shape.output_dtype
    if batch.shape.pooled:
        return weight.new_empty((batch.bags_per_table, batch.width), dtype=dtype)
    return weight.new_empty((batch.indices.shape[0], batch.shape.widest), dtype=dtype)


def _max_positions_like(output: Tensor, batch: TableBatch, with_argmax: bool) -> Tensor:
    """The positions of its maxima, with whatever is in memory; nothing where they are not wanted."""
    shape = output.shape if with_argmax else (0,)
    return output.new_empty(shape, dtype=batch.position_dtype)


# Fake kernels.


def _table_batched_embedding_max_fake(
    weight: Tensor, *batch_and_flags: Any
) -> tuple[Tensor, Tensor]:
    bounds.prepare(weight.device)
    *arguments, _, with_argmax = batch_and_flags
    batch = _batch(*_packed(None, *arguments))
    output = _output_like(weight, batch)
    return output, _max_positions_like(output, batch, with_argmax)


def _table_batched_embedding_fake(
    weight: Tensor, per_sample_weights: Tensor | None, *batch_and_flags: Any
) -> Tensor:
    bounds.prepare(weight.device)
    *arguments, _, _ = batch_and_flags
    return _output_like(weight, _batch(*arguments))


def _table_batched_embedding_dense_backward_fake(
    grad_output: Tensor, per_sample_weights: Tensor | None, *batch_and_length: Any
) -> Tensor:
    *arguments, weight_length = batch_and_length
    batch = _batch(*arguments)
    shape = batch.buffer_shape(weight_length)
    return grad_output.new_empty(shape, dtype=batch.shape.table_dtype)


def _table_batched_embedding_sample_weights_backward_fake(
    grad_output: Tensor, weight: Tensor, indices: Tensor, *arguments: Any
) -> Tensor:
    return weight.new_empty(indices.shape)


table_batched_embedding = define(
    f"table_batched_embedding(Tensor weight, Tensor? per_sample_weights, {_BATCH}, bool zero_padding, "
    "bool sparse) -> Tensor",
    _table_batched_embedding,
    _table_batched_embedding_fake,
)
table_batched_embedding_dense_backward = define(
    "table_batched_embedding_dense_backward(Tensor grad_output, Tensor? per_sample_weights, "
    f"{_BATCH}, SymInt weight_length) -> Tensor",
    _table_batched_embedding_dense_backward,
    _table_batched_embedding_dense_backward_fake,
)
table_batched_embedding_sample_weights_backward = define(
    "table_batched_embedding_sample_weights_backward(Tensor grad_output, Tensor weight, "
    f"{_BATCH}) -> Tensor",
    _table_batched_embedding_sample_weights_backward,
    _table_batched_embedding_sample_weights_backward_fake,
)
table_batched_embedding_max = define(
    f"table_batched_embedding_max(Tensor weight, {_IDS}, {_TABLES}, bool sparse, bool with_argmax) "
    "-> (Tensor, Tensor)",
    _table_batched_embedding_max,
    _table_batched_embedding_max_fake,
)


# Gradients.


def _by_weight(
    grad: Tensor,
    weight_length: int,
    per_sample_weights: Tensor | None,
    *batch_and_flags: Any,
    into: Tensor | None = None,
) -> Tensor:
    *arguments, _zero_padding, sparse = batch_and_flags
    if sparse:
        batch = _batch(*arguments)
        # torch.func differentiates functions of plain tensors.
        if batch.is_uniform or not torch._C._are_functorch_transforms_active():
            return _sparse_gradient(grad, per_sample_weights, batch, weight_length)
    inputs = grad, per_sample_weights, *arguments, weight_length
    if into is not None and into.is_contiguous():
        return _table_batched_embedding_dense_backward(*inputs, into=into)
    return _call_dense_backward(*inputs)


def _by_sample_weights(grad: Tensor, _: int, weight: Tensor, *batch_and_flags: Any) -> Tensor:
    *arguments, _zero_padding, _sparse = batch_and_flags
    return _call_sample_weights_backward(grad, weight, *arguments)


def _dense_backward_by_grad(
    grad: Tensor, _: int, per_sample_weights: Tensor | None, *batch_and_length: Any
) -> Tensor:
    *arguments, _length = batch_and_length
    grad = _of_trained(grad, *arguments)
    return _call(grad, per_sample_weights, *arguments, True, False)


def _dense_backward_by_sample_weights(
    grad: Tensor, _: int, grad_output: Tensor, *batch_and_length: Any
) -> Tensor:
    *arguments, _length = batch_and_length
    grad = _of_trained(grad, *arguments)
    return _call_sample_weights_backward(grad_output, grad, *arguments)


def _of_trained(grad: Tensor, *arguments: Any) -> Tensor:
    """A gradient by the buffer's gradient, which holds none of frozen tables."""
    batch = _batch(*arguments)
    if batch.trained_fields is None:
        return grad
    begin = batch.fields[
        :, TableColumn.FIRST_ROW if batch.is_uniform else TableColumn.FIRST_ELEMENT
    ]
    size = (batch.fields - batch.trained_fields)[:, TableColumn.NUM_ROWS]
    if not batch.is_uniform:
        size = size * batch.fields[:, TableColumn.DIM]
    # Features that share a table begin and end at one place, and trained ones have no size.
    edges = begin.new_zeros(len(grad) + 1)
    edges.index_add_(0, begin, torch.ones_like(begin))
    edges.index_add_(0, begin + size, -torch.ones_like(begin))
    is_frozen = edges.cumsum(0)[:-1] > 0
    return torch.where(is_frozen[:, None] if batch.is_uniform else is_frozen, 0, grad)


def _sample_weights_backward_by_grad(
    grad: Tensor, _: int, weight: Tensor, *arguments: Any
) -> Tensor:
    return _call(weight, grad, *arguments, True, False)


def _sample_weights_backward_by_weight(
    grad: Tensor, weight_length: int, grad_output: Tensor, *arguments: Any
) -> Tensor:
    return _call_dense_backward(grad_output, grad, *arguments, weight_length)


def _sparse_gradient(
    grad_output: Tensor, per_sample_weights: Tensor | None, batch: TableBatch, weight_length: int
) -> Tensor:
    """One entry an id, numbered among the rows of all tables: a COO tensor if they have one D."""
    if batch.bags_per_table == 0:
        # Then no id is in a bag.
        batch = dataclasses.replace(batch, indices=batch.indices[:0])
        per_sample_weights = None
    trained = batch
    if batch.trained_fields is not None:
        trained = dataclasses.replace(batch, fields=batch.trained_fields)
    places = trained.places()
    if not batch.is_uniform:
        shape = torch.Size((weight_length,))
        return _table_gradient(grad_output, per_sample_weights, batch, places, shape)
    rows = torch.where(places.counted, places.row, -1)
    values = grad_output
    if batch.shape.pooled:
        bag = places.bag.clamp(min=0)
        # Bag b of table t is row b * T + t of [B * T, D].
        output_bag = batch.output_bag(places).clamp(min=0)
        values = grad_output.reshape(-1, batch.shape.widest).index_select(0, output_bag)
        if batch.shape.mean:
            wide = values.to(accumulation(values.dtype))
            values = wide / batch.bag_sizes(places)[bag][:, None]
        if batch.max_positions is not None:
            is_max = batch.fields[:, TableColumn.MODE][places.table] == MODES.index("max")
            position = torch.arange(len(rows), device=rows.device)
            contributes = (
                batch.max_positions.view(-1, batch.shape.widest)[output_bag] == position[:, None]
            )
            values = torch.where(contributes | ~is_max[:, None], values, 0)
    if per_sample_weights is not None:
        values = values * per_sample_weights[:, None]
    dtype = batch.shape.table_dtype or grad_output.dtype
    is_new = batch.shape.pooled or per_sample_weights is not None or dtype != grad_output.dtype
    values = values.to(dtype)
    spare = None if trained is batch else trained.first_row()
    return sparse_gradient(values, rows, batch.shape.num_rows, -1, False, is_new, spare)


def _table_gradient(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    batch: TableBatch,
    places: Places,
    shape: torch.Size,
) -> TableGradient:
    """The gradient of a buffer [elements], whose values stay where they are."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the sparse gradient of tables of different embedding_dims is not differentiable, so create_graph=True "
            "needs sparse=False"
        )
    bounds.raise_pending(grad_output.device)
    scales = None
    grad_output = grad_output.to(batch.shape.table_dtype or grad_output.dtype)
    if per_sample_weights is not None:
        scales = per_sample_weights.to(accumulation(grad_output.dtype))
    elif batch.shape.mean:
        sizes = batch.bag_sizes(places)[places.bag.clamp(min=0)]
        scales = 1 / sizes.to(accumulation(grad_output.dtype))
    entries = TableEntries(
        torch.where(places.counted, places.row, -1),
        narrow_positions(batch.output_bag(places).clamp(min=0), batch.bags.num_bags),
        scales,
        batch.max_positions,
        grad_output,
        batch.fields,
        batch.shape.num_rows,
        batch.shape.widest,
        batch.shape.dim_divisor,
    )
    return TableGradient(entries, shape)


def _max_by_weight(
    grad: Tensor,
    weight_shape: torch.Size,
    max_positions: Tensor,
    *tables_and_sparse: Any,
    into: Tensor | None = None,
) -> Tensor:
    *tables, sparse = tables_and_sparse
    batch = _packed(max_positions, *tables)
    return _by_weight(grad, weight_shape[0], None, *batch, False, sparse, into=into)


def _at_max(weight: Tensor, max_positions: Tensor, *tables_and_sparse: Any) -> Tensor:
    *tables, _ = tables_and_sparse
    batch = _packed(max_positions, *tables)
    output: Tensor = table_batched_embedding(weight, None, *batch, False, False)
    return output


_call = register_multilinear(
    table_batched_embedding,
    _table_batched_embedding,
    _by_weight,
    _by_sample_weights,
    constants=_CONSTANTS,
    of_table=True,
)
_call_dense_backward = register_multilinear(
    table_batched_embedding_dense_backward,
    _table_batched_embedding_dense_backward,
    _dense_backward_by_grad,
    _dense_backward_by_sample_weights,
    constants=_CONSTANTS,
)
_call_sample_weights_backward = register_multilinear(
    table_batched_embedding_sample_weights_backward,
    _table_batched_embedding_sample_weights_backward,
    _sample_weights_backward_by_grad,
    _sample_weights_backward_by_weight,
    constants=_CONSTANTS,
)
_call_max = register_argmax(
    table_batched_embedding_max,
    _table_batched_embedding_max,
    _max_by_weight,
    _at_max,
    constants=_CONSTANTS,
)
