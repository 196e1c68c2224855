"""Lookups in quantized tables, which `gpu_embed.QuantizedEmbedding` and `QuantizedEmbeddingBag` call; their errors."""

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..dtypes import IDS, traced_accumulation
from ..exporting import is_exporting
from ..fused_rows import FusedRows, dequantize
from ..ops.quantized import (
    as_batch,
    call_quantized_bag_rows,
    call_quantized_embedding,
    padded_rows,
    quantized_table_rows,
    table_rows,
    unpacked,
)
from ..ops.tables import call_table_batched_embedding
from ..tables.layout import Tables
from . import exported
from .bag import (
    _bag_index_dtypes,
    _check_bag_shapes,
    _check_bag_tensors,
    _check_mode,
    _wrap_bag_padding_idx,
    embedding_bag,
)
from .checks import has_dtensor, wrong_type
from .lookup import check_tensors
from .tables import check_batch, check_sample_weights


def quantized_embedding(
    input: Tensor, weight: Tensor, layout: FusedRows, dtype: torch.dtype
) -> Tensor:
    """The numbers that fused rows stand for, at the ids in `input` -> `[*input.shape, embedding_dim]` of `dtype`."""
    if not isinstance(input, Tensor):
        if has_torch_function_unary(input):
            # torch.fx's proxies and their like record the call.
            return handle_torch_function(
                quantized_embedding, (input,), input, weight, layout, dtype
            )
        raise wrong_type("quantized_embedding", "input", 1, "Tensor", input)
    if type(input) is not Tensor or type(weight) is not Tensor:
        _check_not_sharded(input, weight)
    check_tensors(input, weight)
    if is_compiling() and is_exporting():
        return _plain_rows(weight, input, layout).to(dtype)
    return call_quantized_embedding(weight, input, *layout, dtype)


def quantized_embedding_bag(
    input: Tensor,
    weight: Tensor,
    layout: FusedRows,
    dtype: torch.dtype,
    offsets: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`functional.embedding_bag` of what fused rows stand for -> `[B, embedding_dim]` of `dtype`.

    The row of each id is dequantized, and the bags are taken from these: sums in fp32, rounded once.
    """
    given = (input, offsets, per_sample_weights)
    if any(not isinstance(one, Tensor) and has_torch_function_unary(one) for one in given):
        return handle_torch_function(
            quantized_embedding_bag,
            given,
            input,
            weight,
            layout,
            dtype,
            offsets,
            mode,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    _check_not_sharded(input, weight, offsets, per_sample_weights)
    _check_bag_shapes(input, weight, offsets, per_sample_weights)
    if mode not in ("sum", "mean"):
        _check_mode(mode, False, False)
    if per_sample_weights is not None and mode != "sum":
        raise NotImplementedError(
            f"quantized_embedding_bag: per_sample_weights are only supported for mode='sum' (got mode={mode!r})"
        )
    padding_row = -1
    if padding_idx is not None:
        padding_row = _wrap_bag_padding_idx(padding_idx, weight.size(0))
    if input.dtype not in IDS or not (offsets is None or offsets.dtype in IDS):
        input, offsets = _bag_index_dtypes(input, offsets)
    # To the caller the table has the output's dtype.
    stand_in = weight.new_empty((0, 0), dtype=dtype)
    _check_bag_tensors(input, stand_in, offsets, per_sample_weights)
    include_last_offset &= offsets is not None
    if include_last_offset and offsets is not None and offsets.size(0) == 0:
        raise RuntimeError("include_last_offset: number of offset should be at least 1")
    wide = traced_accumulation(dtype)
    if is_compiling() and is_exporting():
        rows = _plain_rows(weight, input.flatten(), layout).to(wide)
        return exported.bags_of_rows(
            rows, input, offsets, mode, per_sample_weights, include_last_offset, padding_row
        ).to(dtype)
    rows, places = call_quantized_bag_rows(
        weight, input, offsets, include_last_offset, padding_row, *layout, wide
    )
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.to(wide)
    return embedding_bag(
        places,
        rows,
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=None if padding_idx is None else 0,
    ).to(dtype)


def _plain_rows(weight: Tensor, input: Tensor, layout: FusedRows) -> Tensor:
    """Rows in torch's operators, fp32, for graphs that are exported."""
    fused = exported.embedding(input, weight)
    return dequantize(fused, layout, for_onnx=torch.onnx.is_in_onnx_export())


def _plain_rows_or_none(weight: Tensor, input: Tensor, layout: FusedRows) -> Tensor:
    """The same; zeros where the table has no rows."""
    if weight.shape[0] == 0:
        return weight.new_zeros((*input.shape, layout.embedding_dim), dtype=torch.float32)
    return _plain_rows(weight, input, layout)


def quantized_tables(
    input: Tensor,
    offsets: Tensor,
    weights: list[Tensor],
    formats: list[int],
    tables: Tables,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    per_sample_weights: Tensor | None = None,
    *,
    pooled: bool,
) -> Tensor:
    """`functional.tables` of what fused rows stand for: `[B, sum of embedding_dims]`, or rows `[N, embedding_dim]`.

    The row of each id is dequantized, once for each embedding_dim, and the batch is taken from these. See
    `ops.quantized` for the arguments; in `tables.fields` FIRST_ELEMENT is the sum of the embedding_dims before. To the
    caller the tables are of `dtype`, and so are per-sample weights.
    """
    function = "quantized_table_batched_embedding" + ("_bag" if pooled else "")
    stand_in = weights[0].new_empty((0, 0), dtype=dtype)
    check_batch(function, input, offsets, stand_in, tables.layout)
    check_sample_weights(input, per_sample_weights, stand_in, tables.layout)
    wide = traced_accumulation(output_dtype)
    if is_compiling() and is_exporting():
        batch = as_batch(input, offsets, tables.fields, pooled)
        layouts = unpacked(formats)
        rows, places = table_rows(weights, batch, batch.places(), layouts, _plain_rows_or_none)
        rows = rows.to(wide)
    else:
        rows, places = quantized_table_rows(
            weights, input, offsets, tables.fields, formats, pooled, wide
        )
    num_indices = input.shape[0]
    # As TableColumn has them: every table is the rows that its embedding_dim has in the batch.
    _, _, dims_before, dim, first_column, mode, padding_idx, name = tables.fields.unbind(1)
    if pooled:
        padding_idx = torch.where(padding_idx >= 0, num_indices, -1)
    else:
        padding_idx = torch.full_like(padding_idx, -1)
    columns = (
        torch.zeros_like(dim),
        torch.full_like(dim, num_indices + 1),
        dims_before * padded_rows(num_indices),
        dim,
        first_column,
        mode,
        padding_idx,
        name,
    )
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.to(wide)
    look_up = call_table_batched_embedding
    if is_compiling() and is_exporting():
        look_up = exported.table_batched_embedding
    return look_up(
        rows,
        per_sample_weights,
        places,
        offsets,
        tables._replace(fields=torch.stack(columns, dim=1)),
        pooled,
        False,
        output_dtype,
    )


def _check_not_sharded(*tensors: Tensor | None) -> None:
    if has_dtensor(*tensors):
        raise NotImplementedError(
            "a quantized table is looked up whole, on each rank, by plain tensors: give it ids.to_local(); to shard a "
            "table, keep it in floating point"
        )
