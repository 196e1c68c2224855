"""Lookups in torch's operators alone, for what torch.export records: the graph runs where this package is not."""

from collections.abc import Collection
from math import gcd

import torch
from torch import Tensor

from ..bags import first_maxima, make_bags
from ..dtypes import traced_accumulation
from ..tables.batch import TableBatch
from ..tables.layout import TABLE_ALIGNMENT, TableColumn, Tables


def embedding(input: Tensor, weight: Tensor, *arguments: object) -> Tensor:
    """`torch.nn.functional.embedding` for ids of every dtype that ours takes."""
    return torch.nn.functional.embedding(_torch_ids(input), weight, *arguments)  # type: ignore[arg-type]


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    mode: str,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    """`torch.nn.functional.embedding_bag` likewise; for ONNX a gather and a segment sum.

    Args:
        padding_idx: -1: none.
    """
    input = _torch_ids(input)
    if not torch.onnx.is_in_onnx_export():
        # Ids behind the last offset are a bag of their own here: in torch's last bag they count for some modes.
        output = torch.nn.functional.embedding_bag(
            input,
            weight,
            None if offsets is None else _torch_ids(offsets),
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            False,
            None if padding_idx < 0 else padding_idx,
        )
        return output[:-1] if include_last_offset else output
    # The exporter's own bag is a loop over the bags, with a loop over the ids of each within it.
    rows = torch.nn.functional.embedding(input.flatten(), weight, None, max_norm, norm_type)
    return bags_of_rows(
        rows, input, offsets, mode, per_sample_weights, include_last_offset, padding_idx
    ).to(weight.dtype)


def bags_of_rows(
    rows: Tensor,
    input: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int,
) -> Tensor:
    """The bags of ids whose rows are given, [N, D] -> [B, D], in the dtype that sums are taken in."""
    bags = make_bags(input, offsets, include_last_offset)
    bag = bags.bag_of()
    if padding_idx >= 0:
        bag = torch.where(bags.indices == padding_idx, -1, bag)
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.reshape(-1)
    return _pooled(rows, per_sample_weights, bag, bags.num_bags, (mode,))[mode][:-1]


def table_batched_embedding(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    tables: Tables,
    pooled: bool,
    sparse: bool,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """A batch in these tables. The gradient of tables of different embedding_dims is dense, whatever `sparse` says."""
    layout = tables.layout
    ids = indices.to(torch.int64)
    batch = TableBatch(ids, offsets, tables.fields, tables.table_of_column, layout.shape(pooled))
    bags_per_feature = batch.bags_per_table
    places = batch.places()
    in_bag = places.bag >= 0

    def of_feature(column: TableColumn) -> Tensor:
        return tables.fields[:, column][places.table]

    # Rows are read in units that every table begins at and every row is made of.
    unit = gcd(*layout.embedding_dims, 0 if layout.is_uniform else TABLE_ALIGNMENT)
    widest = max(layout.embedding_dims)
    units = weight if layout.is_uniform else weight.view(-1, unit)
    first = of_feature(TableColumn.FIRST_ELEMENT) + ids * of_feature(TableColumn.DIM)
    # What lies behind a shorter row is read too, and cut off.
    index = first[:, None] // unit + torch.arange(widest // unit, device=ids.device)
    index = index.clamp(max=units.shape[0] - 1)
    # An id that its table does not have is none that the operator has: the error is its own.
    index = torch.where(places.row[:, None] >= 0, index, units.shape[0])
    read = places.counted if pooled else in_bag
    index = torch.where(read[:, None], index, 0)
    rows = torch.nn.functional.embedding(index, units, sparse=sparse and layout.is_uniform)
    rows = rows.view(-1, widest)
    if tables.trained_fields is not None:
        is_trained = tables.trained_fields[:, TableColumn.NUM_ROWS][places.table] > 0
        rows = torch.where(is_trained[:, None], rows, rows.detach())
    dtype = output_dtype or weight.dtype
    if not pooled:
        if max(layout.padding_idx) >= 0:
            rows = torch.where(places.counted[:, None], rows, rows.detach())
        return torch.where(in_bag[:, None], rows, 0).to(dtype)
    bag = torch.where(places.counted, places.bag, -1)
    by_mode = _pooled(rows, per_sample_weights, bag, batch.bags.num_bags, set(layout.modes))
    columns = []
    for number, table in enumerate(layout.feature_tables):
        output = by_mode[layout.modes[table]]
        output = output.narrow(0, number * bags_per_feature, bags_per_feature)
        columns.append(output[:, : layout.embedding_dims[table]])
    return torch.cat(columns, 1).to(dtype)


def _pooled(
    rows: Tensor,
    per_sample_weights: Tensor | None,
    bag: Tensor,
    num_bags: int,
    modes: Collection[str],
) -> dict[str, Tensor]:
    """The bags' rows [N, D] in one -> by mode [num_bags + 1, D], in the dtype that sums are taken in.

    Args:
        bag: [N]; -1 where an id takes no part: those are put together behind the bags.
    """
    bag = torch.where(bag < 0, num_bags, bag)
    rows = rows.to(traced_accumulation(rows.dtype))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.to(rows.dtype)[:, None]
    outputs = {}
    if "sum" in modes or "mean" in modes:
        sums = rows.new_zeros(num_bags + 1, rows.shape[1]).index_add(0, bag, rows)
        outputs["sum"] = sums
    if "mean" in modes:
        sizes = bag.new_zeros(num_bags + 1).index_add(0, bag, torch.ones_like(bag))
        outputs["mean"] = sums / sizes.clamp(min=1)[:, None]
    if "max" in modes:
        # An empty bag's maximum is the row of zeros at the end.
        positions = first_maxima(rows, bag, num_bags)
        outputs["max"] = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).gather(0, positions)
    return {mode: outputs[mode] for mode in modes}


def _torch_ids(ids: Tensor) -> Tensor:
    """Ids or offsets of a dtype that torch's lookups take."""
    return ids if ids.dtype in (torch.int64, torch.int32) else ids.to(torch.int64)
