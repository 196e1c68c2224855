"""The gpu_embed::quantized_* operators: lookups in fused rows, and what bags of them are taken from.

Ids are torch's, and those out of range are recorded as in every lookup; see `bounds`. The codes have no gradient.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, bounds
from ..bags import Bags
from ..bounds import BoundsRecord, all_in_table, in_table
from ..fused_rows import FusedRows
from ..take import fused_table
from .autograd import define, register_loop
from .bag import _checked_bags
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
    """The row of each id, and behind them one that stands for padding -> [N + 1, embedding_dim]; ids of these rows.

    An id out of range, which is recorded, becomes -1, and padding N.
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
    places = torch.arange(len(ids), device=ids.device)
    if ids.is_cuda or not all_in_table(ids, num_embeddings):
        if record is not None:
            record.write_bags(bags, num_embeddings)
        places = torch.where(in_table(ids, num_embeddings), places, -1)
    if padding_idx >= 0:
        places = torch.where(ids == padding_idx, len(ids), places)
    rows = _dequantize(weight, torch.cat([ids, ids[:1]]), layout, dtype, None)
    return rows, places


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
