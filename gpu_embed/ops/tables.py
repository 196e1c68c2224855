"""The gpu_embed::table_batched_embedding* operators: `bag_ops` for many tables in one buffer.

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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from .. import backends, bounds
from ..bags import check_offsets
from ..dtypes import accumulation
from ..tables.batch import Places, TableBatch
from ..tables.entries import TableEntries, narrow_positions
from ..tables.gradient import TableGradient
from ..tables.layout import MODES, TableColumn, TableShape
from . import lookup as ops
from .bag import below_autograd, inside_function, is_plain_call, register_bilinear

# What a `TableBatch` holds: the same arguments of every operator here but the one that finds the winner.
_SHAPE = "SymInt num_rows, SymInt widest, SymInt dim_divisor, bool mean, bool pooled"
_TABLES = "Tensor indices, Tensor offsets, Tensor fields, Tensor table_of_column"
_BATCH = f"{_TABLES}, Tensor? winner, {_SHAPE}"
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
_library.define(
    f"table_batched_embedding_max(Tensor weight, {_TABLES}, {_SHAPE}, bool with_winner, bool sparse) "
    "-> (Tensor, Tensor)"
)
table_batched_embedding = torch.ops.gpu_embed.table_batched_embedding.default
table_batched_embedding_dense_backward = (
    torch.ops.gpu_embed.table_batched_embedding_dense_backward.default
)
table_batched_embedding_sample_weights_backward = (
    torch.ops.gpu_embed.table_batched_embedding_sample_weights_backward.default
)
table_batched_embedding_max = torch.ops.gpu_embed.table_batched_embedding_max.default


def _batch(
    indices: Tensor,
    offsets: Tensor,
    fields: Tensor,
    table_of_column: Tensor,
    winner: Tensor | None,
    *shape: Any,
) -> TableBatch:
    return TableBatch(
        indices.contiguous(),
        offsets.contiguous(),
        fields,
        table_of_column,
        TableShape(*shape),
        None if winner is None else winner.contiguous(),
    )


# Kernels: what runs below autograd, on every device.


def _look_up(
    weight: Tensor,
    batch: TableBatch,
    compute: Callable[[backends.Backend, bounds.BoundsRecord | None], Any],
) -> Any:
    """What `compute` makes of the batch, ids out of range reported; None where there is nothing to look up."""
    device = weight.device
    bounds.raise_pending(device)
    if device.type == "cpu":
        check_offsets(batch.offsets, batch.indices)
    if batch.indices.numel() == 0 or batch.bags_per_table == 0:
        return None
    record = bounds.record_for(device)
    output = compute(backends.select(device), record)
    if record is not None:
        record.finish_lookup(batch.indices)
    return output


def _table_batched_embedding(
    weight: Tensor, per_sample_weights: Tensor | None, *batch_and_flags: Any
) -> Tensor:
    *arguments, zero_padding, _ = batch_and_flags
    batch = _batch(*arguments)

    def compute(backend: backends.Backend, record: bounds.BoundsRecord | None) -> Tensor:
        return backend.table_batched_embedding(
            weight.contiguous(), _adjacent(per_sample_weights), batch, zero_padding, record
        )

    output = _look_up(weight, batch, compute)
    return _output_like(weight, batch).zero_() if output is None else output


def _table_batched_embedding_max(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    fields: Tensor,
    table_of_column: Tensor,
    *shape_and_flags: Any,
) -> tuple[Tensor, Tensor]:
    *shape, with_winner, _ = shape_and_flags
    batch = _batch(indices, offsets, fields, table_of_column, None, *shape)

    def compute(
        backend: backends.Backend, record: bounds.BoundsRecord | None
    ) -> tuple[Tensor, Tensor]:
        return backend.table_batched_embedding_max(weight.contiguous(), batch, with_winner, record)

    found: tuple[Tensor, Tensor] | None = _look_up(weight, batch, compute)
    if found is None:
        output = _output_like(weight, batch).zero_()
        return output, _winner_like(output, batch, with_winner).fill_(-1)
    return found


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


def _winner_like(output: Tensor, batch: TableBatch, with_winner: bool) -> Tensor:
    """The positions of its maxima, with whatever is in memory; nothing where they are not wanted."""
    shape = output.shape if with_winner else (0,)
    return output.new_empty(shape, dtype=batch.position_dtype)


# Shapes without data.


def _table_batched_embedding_max_fake(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    fields: Tensor,
    table_of_column: Tensor,
    *shape_and_flags: Any,
) -> tuple[Tensor, Tensor]:
    bounds.prepare(weight.device)
    *shape, with_winner, _ = shape_and_flags
    batch = _batch(indices, offsets, fields, table_of_column, None, *shape)
    output = _output_like(weight, batch)
    return output, _winner_like(output, batch, with_winner)


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
    return grad_output.new_empty(_batch(*arguments).buffer_shape(weight_length))


def _table_batched_embedding_sample_weights_backward_fake(
    grad_output: Tensor, weight: Tensor, indices: Tensor, *arguments: Any
) -> Tensor:
    return grad_output.new_empty(indices.shape)


for _name, _kernel, _fake in (
    ("table_batched_embedding", _table_batched_embedding, _table_batched_embedding_fake),
    (
        "table_batched_embedding_max",
        _table_batched_embedding_max,
        _table_batched_embedding_max_fake,
    ),
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
    is_uniform = _batch(*arguments).is_uniform
    # torch.func differentiates functions of plain tensors.
    if sparse and (is_uniform or not torch._C._are_functorch_transforms_active()):
        return _sparse_gradient(grad, per_sample_weights, _batch(*arguments), weight_length)
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
    grad_output: Tensor, per_sample_weights: Tensor | None, batch: TableBatch, weight_length: int
) -> Tensor:
    """One entry an id, numbered among the rows of all tables: a COO tensor if they have one D."""
    if batch.bags_per_table == 0:
        # Then no id is in a bag.
        batch = dataclasses.replace(batch, indices=batch.indices[:0])
        per_sample_weights = None
    places = batch.places()
    if not batch.is_uniform:
        shape = torch.Size((weight_length,))
        return _table_gradient(grad_output, per_sample_weights, batch, places, shape)
    rows = torch.where(places.counted, places.row, -1)
    values = grad_output
    if batch.shape.pooled:
        bag = places.bag.clamp(min=0)
        # Bag b of table t is row b * T + t of [B * T, D].
        source = batch.sources(places).clamp(min=0)
        values = grad_output.reshape(-1, batch.shape.widest)[source]
        if batch.shape.mean:
            wide = values.to(accumulation(values.dtype))
            values = (wide / batch.bag_sizes(places)[bag][:, None]).to(values.dtype)
        if batch.winner is not None:
            is_max = batch.fields[:, TableColumn.MODE][places.table] == MODES.index("max")
            position = torch.arange(len(rows), device=rows.device)
            won = batch.winner.view(-1, batch.shape.widest)[source] == position[:, None]
            values = torch.where(won | ~is_max[:, None], values, 0)
    if per_sample_weights is not None:
        values = values * per_sample_weights[:, None]
    return ops.sparse_gradient(values, rows, batch.shape.num_rows, -1, False)


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
    if per_sample_weights is not None:
        scales = per_sample_weights.to(accumulation(grad_output.dtype))
    elif batch.shape.mean:
        sizes = batch.bag_sizes(places)[places.bag.clamp(min=0)]
        scales = 1 / sizes.to(accumulation(grad_output.dtype))
    entries = TableEntries(
        torch.where(places.counted, places.row, -1),
        narrow_positions(batch.sources(places).clamp(min=0), batch.bags.num_bags),
        scales,
        batch.winner,
        grad_output,
        batch.fields,
        batch.shape.num_rows,
        batch.shape.widest,
        batch.shape.dim_divisor,
    )
    return TableGradient(entries, shape)


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


# The positions of maxima.


class _Max(_SingleLevelFunction):
    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def forward(keyset: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        if keyset is None:
            return _table_batched_embedding_max(*inputs)
        found: tuple[Tensor, Tensor] = inside_function(keyset, table_batched_embedding_max, *inputs)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, indices, offsets, fields, table_of_column, *shape, _, ctx.sparse = inputs
        _, winner = output
        ctx.mark_non_differentiable(winner)
        ctx.weight_length = weight.shape[0]
        ctx.tables, ctx.shape = (fields, table_of_column), shape
        # Saved, so that autograd notices ids that were changed in place.
        ctx.save_for_backward(indices, offsets, winner)
        if torch.autograd.forward_ad._current_level >= 0:
            ctx.save_for_forward(indices, offsets, winner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        indices, offsets, winner = ctx.saved_tensors
        batch = (indices, offsets, *ctx.tables, winner, *ctx.shape)
        grad_weight = _by_weight(grad, ctx.weight_length, None, *batch, False, ctx.sparse)
        return None, grad_weight, *(None,) * (len(batch) + 1)

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor | None, *rest: None) -> tuple[Tensor | None, None]:
        if tangent is None:
            return None, None
        indices, offsets, winner = ctx.saved_tensors
        batch = (indices, offsets, *ctx.tables, winner, *ctx.shape)
        return table_batched_embedding(tangent, None, *batch, False, False), None


_apply_max: Callable[..., tuple[Tensor, Tensor]] = _Max.apply  # type: ignore[attr-defined]


def _max_autograd(keyset: Any, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    differentiated = torch.is_grad_enabled() and weight.requires_grad
    if not differentiated and torch.autograd.forward_ad._current_level < 0:
        found: tuple[Tensor, Tensor] = below_autograd(
            keyset, table_batched_embedding_max, weight, *rest
        )
        return found
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return _apply_max(keyset, weight, *rest)
    return _apply_max(keyset, weight, *rest)


_library.impl("table_batched_embedding_max", _max_autograd, "Autograd", with_keyset=True)


def call_table_batched_embedding_max(
    weight: Tensor, indices: Tensor, offsets: Tensor, *tables_and_sparse: Any
) -> Tensor:
    """The output alone."""
    *tables, sparse = tables_and_sparse
    batch = (indices, offsets, *tables)
    if not is_plain_call(weight, None, indices, offsets):
        output, _ = table_batched_embedding_max(weight, *batch, True, sparse)
    elif weight.requires_grad and torch.is_grad_enabled():
        output, _ = _apply_max(None, weight, *batch, True, sparse)
    else:
        output, _ = _table_batched_embedding_max(weight, *batch, False, sparse)
    return output
