"""The gpu_embed::quantized_* operators: lookups in fused rows, and what bags of them are taken from.

Ids are torch's, and those out of range are recorded as in every lookup; see `bounds`. The codes have no gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import backends, bounds
from ..bags import Bags, check_offsets
from ..bounds import BoundsRecord, all_in_table, in_table
from ..fused_rows import FusedRows
from ..tables.batch import Places, TableBatch, write_out_of_range
from ..tables.layout import TABLE_ALIGNMENT, TableColumn, TableShape
from ..take import fused_table
from .autograd import register_loop
from .bag import _checked_bags
from .library import define
from .plain import is_plain_call

# Dispatcher kernels (CompositeExplicitAutograd).


def _quantized_embedding(
    weight: Tensor,
    indices: Tensor,
    embedding_dim: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of fused rows at indices [...] -> [..., embedding_dim]."""
    layout = FusedRows(embedding_dim, group_size, bits)
    if indices.numel() == 0:
        bounds.raise_pending(weight.device)
        return weight.new_empty((*indices.shape, embedding_dim), dtype=dtype)
    return bounds.looked_up(
        weight.device, indices, partial(_dequantize, weight, indices, layout, dtype)
    )


def _dequantize(
    weight: Tensor,
    indices: Tensor,
    layout: FusedRows,
    dtype: torch.dtype,
    record: BoundsRecord | None,
) -> Tensor:
    # There are no kernels for fp64, which holds what fp32 holds.
    wide = torch.float32 if dtype == torch.float64 else dtype
    dequantize_rows = backends.select(weight.device).dequantize_rows
    rows = dequantize_rows(fused_table(weight, layout), indices, wide, record)
    return rows if wide == dtype else rows.to(dtype)


def _quantized_bag_rows(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    embedding_dim: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """A row that stands for padding, and the row of each id -> [N + 1, embedding_dim]; ids of these rows.

    The id at position i becomes i + 1, padding 0, and an id out of range, which is recorded, -1. Padding has a row that
    does not depend on how many ids there are, as torch.jit.trace keeps its number.
    """
    layout = FusedRows(embedding_dim, group_size, bits)
    bags = _checked_bags(indices, offsets, include_last_offset)
    if indices.numel() == 0:
        bounds.raise_pending(weight.device)
        return weight.new_zeros((1, embedding_dim), dtype=dtype), indices.to(torch.int64)
    compute = partial(_bag_rows, weight, bags, padding_idx, layout, dtype)
    rows, places = bounds.looked_up(weight.device, indices, compute)
    return rows, places.view(indices.shape)


def _bag_rows(
    weight: Tensor,
    bags: Bags,
    padding_idx: int,
    layout: FusedRows,
    dtype: torch.dtype,
    record: BoundsRecord | None,
) -> tuple[Tensor, Tensor]:
    ids, num_embeddings = bags.indices, weight.shape[0]
    places = torch.arange(1, len(ids) + 1, device=ids.device)
    if ids.is_cuda or not all_in_table(ids, num_embeddings):
        if record is not None:
            record.write_bags(bags, num_embeddings)
        places = torch.where(in_table(ids, num_embeddings), places, -1)
    if padding_idx >= 0:
        places = torch.where(ids == padding_idx, 0, places)
    rows = _dequantize(weight, torch.cat([ids[:1], ids]), layout, dtype, None)
    return rows, places


def _quantized_table_rows(
    weights: list[Tensor],
    indices: Tensor,
    offsets: Tensor,
    fields: Tensor,
    formats: list[int],
    pooled: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The row of each id of a batch, of all tables' embedding_dims, and ids of these rows.

    Args:
        weights: for each embedding_dim, its tables' fused rows, one table behind another.
        fields: `tables.Tables.fields`, where a table's first row is counted among those of its embedding_dim.
        formats: the `FusedRows` of each weight, one behind another.

    Returns:
        `[M, D]` of one embedding_dim, else `[M * sum of D]`, one embedding_dim's rows behind another; M is
        `padded_rows(N)`. And int64 [N]: the position; N for padding, where there is pooling; -1 in no bag, or for an id
        out of range, which is recorded.
    """
    if indices.device.type == "cpu":
        check_offsets(offsets, indices)
    num_indices = indices.numel()
    if num_indices == 0 or offsets.numel() == 1:
        bounds.raise_pending(indices.device)
        fake = _quantized_table_rows_fake(weights, indices, offsets, fields, formats, pooled, dtype)
        return fake[0].zero_(), fake[1].fill_(-1)
    batch = as_batch(indices, offsets, fields, pooled)
    compute = partial(_recorded_table_rows, weights, batch, unpacked(formats), dtype)
    return bounds.looked_up(indices.device, indices, compute)


def _recorded_table_rows(
    weights: list[Tensor],
    batch: TableBatch,
    layouts: list[FusedRows],
    dtype: torch.dtype,
    record: BoundsRecord | None,
) -> tuple[Tensor, Tensor]:
    places = batch.places()
    if record is not None:
        write_out_of_range(record, batch, places)

    def look_up(weight: Tensor, ids: Tensor, layout: FusedRows) -> Tensor:
        return _dequantize(weight, ids, layout, dtype, None)

    return table_rows(weights, batch, places, layouts, look_up)


def as_batch(indices: Tensor, offsets: Tensor, fields: Tensor, pooled: bool) -> TableBatch:
    """A batch that knows its places, and no output."""
    shape = TableShape(0, 0, 1, False, pooled)
    return TableBatch(indices.contiguous(), offsets.contiguous(), fields, fields[:0, 0], shape)


def table_rows(
    weights: list[Tensor],
    batch: TableBatch,
    places: Places,
    layouts: list[FusedRows],
    look_up: Callable[[Tensor, Tensor, FusedRows], Tensor],
) -> tuple[Tensor, Tensor]:
    """`quantized_table_rows` by a lookup in one weight, of ids that are in it where it has rows."""
    num_indices = batch.indices.shape[0]
    positions = torch.arange(num_indices, device=batch.indices.device)
    found = torch.where(places.row >= 0, positions, -1)
    if batch.shape.pooled:
        found = torch.where((places.row >= 0) & ~places.counted, num_indices, found)
    behind = (0, padded_rows(num_indices) - num_indices)
    rows = pad(places.row.clamp(min=0), behind)
    dim_of = pad(batch.fields[:, TableColumn.DIM][places.table], behind)
    parts = []
    for weight, layout in zip(weights, layouts, strict=True):
        ids = rows if len(weights) == 1 else torch.where(dim_of == layout.embedding_dim, rows, 0)
        parts.append(look_up(weight, ids, layout))
    return parts[0] if len(parts) == 1 else torch.cat([part.view(-1) for part in parts]), found


def padded_rows(num_indices: int) -> int:
    """Rows that a batch of so many ids has: one for padding, and what aligns each embedding_dim's."""
    return (num_indices // TABLE_ALIGNMENT + 1) * TABLE_ALIGNMENT


def unpacked(formats: list[int]) -> list[FusedRows]:
    return [FusedRows(*formats[first : first + 3]) for first in range(0, len(formats), 3)]


# Fake kernels.


def _quantized_embedding_fake(
    weight: Tensor,
    indices: Tensor,
    embedding_dim: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    bounds.prepare(weight.device)
    return weight.new_empty((*indices.shape, embedding_dim), dtype=dtype)


def _quantized_bag_rows_fake(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
    embedding_dim: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    bounds.prepare(weight.device)
    rows = weight.new_empty((indices.numel() + 1, embedding_dim), dtype=dtype)
    return rows, indices.new_empty(indices.shape, dtype=torch.int64)


def _quantized_table_rows_fake(
    weights: list[Tensor],
    indices: Tensor,
    offsets: Tensor,
    fields: Tensor,
    formats: list[int],
    pooled: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    bounds.prepare(indices.device)
    num_rows, dims = padded_rows(indices.shape[0]), [one.embedding_dim for one in unpacked(formats)]
    shape = (num_rows, dims[0]) if len(dims) == 1 else (num_rows * sum(dims),)
    return weights[0].new_empty(shape, dtype=dtype), indices.new_empty(
        indices.shape, dtype=torch.int64
    )


_FORMAT = "SymInt embedding_dim, SymInt group_size, SymInt bits, ScalarType dtype"
quantized_embedding = define(
    f"quantized_embedding(Tensor weight, Tensor indices, {_FORMAT}) -> Tensor",
    _quantized_embedding,
    _quantized_embedding_fake,
)
quantized_bag_rows = define(
    "quantized_bag_rows(Tensor weight, Tensor indices, Tensor? offsets, bool include_last_offset, "
    f"SymInt padding_idx, {_FORMAT}) -> (Tensor, Tensor)",
    _quantized_bag_rows,
    _quantized_bag_rows_fake,
)
quantized_table_rows = define(
    "quantized_table_rows(Tensor[] weights, Tensor indices, Tensor offsets, Tensor fields, SymInt[] formats, "
    "bool pooled, ScalarType dtype) -> (Tensor, Tensor)",
    _quantized_table_rows,
    _quantized_table_rows_fake,
)


def call_quantized_embedding(weight: Tensor, indices: Tensor, *arguments: Any) -> Tensor:
    """`quantized_embedding`, past the dispatcher where that has nothing to do."""
    run = _quantized_embedding if is_plain_call(weight, indices) else quantized_embedding
    return run(weight, indices, *arguments)


def call_quantized_bag_rows(
    weight: Tensor, indices: Tensor, offsets: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """`quantized_bag_rows`, likewise."""
    run = _quantized_bag_rows if is_plain_call(weight, indices, offsets) else quantized_bag_rows
    return run(weight, indices, offsets, *arguments)


register_loop(quantized_embedding)
register_loop(quantized_bag_rows)
