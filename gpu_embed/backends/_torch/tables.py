"""Batched tables in torch's operators, for the torch backend: all tables at once, with no wait for the GPU."""

from dataclasses import replace

import torch
from torch import Tensor

from ...bags import first_maxima
from ...dtypes import accumulation
from ...tables.batch import Places, TableBatch
from ...tables.entries import sums_of_rows
from ...tables.layout import MODES, TableColumn


def embedding(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    batch: TableBatch,
    zero_padding: bool,
    places: Places,
) -> Tensor:
    """`Backend.table_batched_embedding` but for the record."""
    read = places.row >= 0
    if batch.shape.pooled or zero_padding:
        read &= places.counted
    rows = _rows(weight, batch, places, read)
    if not batch.shape.pooled:
        return rows.to(batch.shape.output_dtype or weight.dtype)
    rows = rows.to(accumulation(weight.dtype))
    if per_sample_weights is not None:
        rows = torch.where(read[:, None], rows * per_sample_weights[:, None], 0)
    if batch.max_positions is not None:
        rows = torch.where(_contributes(batch, places), rows, 0)
    # Positions in no bag go to an extra one.
    num_bags = batch.bags.num_bags
    total = rows.new_zeros(num_bags + 1, batch.shape.widest)
    total.index_add_(0, torch.where(places.bag < 0, num_bags, places.bag), rows)
    total = total[:-1]
    if batch.shape.mean:
        total /= batch.bag_sizes(places)[:, None]
    return _columns(total, batch).to(batch.shape.output_dtype or weight.dtype)


def embedding_max(
    weight: Tensor, batch: TableBatch, with_argmax: bool, places: Places
) -> tuple[Tensor, Tensor]:
    """`Backend.table_batched_embedding_max` but for the record."""
    read = places.counted & (places.row >= 0)
    rows = _rows(weight, batch, places, read)
    num_bags, num_indices = batch.bags.num_bags, len(read)
    # What takes no part goes to an extra bag.
    max_positions = first_maxima(rows, torch.where(read, places.bag, num_bags), num_bags)[:-1]
    max_positions = torch.where(max_positions < num_indices, max_positions, -1)
    max_positions = _columns(max_positions, batch).to(batch.position_dtype)
    output = embedding(weight, None, replace(batch, max_positions=max_positions), False, places)
    return output, max_positions if with_argmax else max_positions.new_empty(0)


def dense_backward(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    batch: TableBatch,
    weight_shape: tuple[int, ...],
    into: Tensor | None = None,
) -> Tensor:
    """`Backend.table_batched_embedding_dense_backward`."""
    places = batch.places()
    kept = places.counted & (places.row >= 0)
    values = grad_output.to(accumulation(grad_output.dtype))
    if batch.shape.pooled:
        values = _bag_rows(values, batch)
        if batch.shape.mean:
            values = values / batch.bag_sizes(places)[:, None]
        values = values[places.bag.clamp(min=0)]
        if batch.max_positions is not None:
            values = torch.where(_contributes(batch, places), values, 0)
    if per_sample_weights is not None:
        values = values * per_sample_weights[:, None]
    total = sums_of_rows(torch.where(kept, places.row, -1), values)
    grad_weight = into
    if grad_weight is None:
        grad_weight = grad_output.new_zeros(weight_shape, dtype=batch.shape.table_dtype)
    flat = grad_weight.view(-1)
    if len(kept) == 0:
        return grad_weight
    # Every position of a row writes the same sum. What takes no part writes the first sum of a row once more, or
    # where there is none what the first element holds: no slice and no count waits for the GPU.
    first = kept.to(torch.int8).argmax().view(1)
    elements = _elements(batch, places, kept, -1)
    in_use = elements >= 0
    elements = torch.where(in_use, elements, elements[:, 0].index_select(0, first).clamp(min=0))
    sums = flat[elements] + torch.where(in_use, total, 0)
    again = torch.where(in_use.any(), sums[:, 0].index_select(0, first), flat[:1])
    flat[elements] = torch.where(in_use, sums, again).to(flat.dtype)
    return grad_weight


def sample_weights_backward(grad_output: Tensor, weight: Tensor, batch: TableBatch) -> Tensor:
    """`Backend.table_batched_embedding_sample_weights_backward`."""
    places = batch.places()
    read = places.counted & (places.row >= 0)
    wide = accumulation(weight.dtype)
    rows = _rows(weight, batch, places, read).to(wide)
    products = rows * _bag_rows(grad_output, batch)[places.bag.clamp(min=0)].to(wide)
    return torch.where(read, products.sum(1), 0).to(weight.dtype)


def _contributes(batch: TableBatch, places: Places) -> Tensor:
    """Which elements of each position's row its bag takes -> bool [N, widest]: of a maximum, those that are it."""
    assert batch.max_positions is not None
    position = torch.arange(len(places.bag), device=places.bag.device)
    max_positions = _bag_rows(batch.max_positions, batch)[places.bag.clamp(min=0)]
    is_max = batch.fields[:, TableColumn.MODE][places.table] == MODES.index("max")
    return ~is_max[:, None] | (max_positions == position[:, None])


def _rows(weight: Tensor, batch: TableBatch, places: Places, read: Tensor) -> Tensor:
    """Each position's row -> [N, widest], behind its table's D and where it is not read zero."""
    elements = weight.reshape(-1)
    if len(elements) == 0:
        return weight.new_zeros(len(read), batch.shape.widest)
    rows = elements[_elements(batch, places, read, 0)]
    return torch.where(read[:, None] & _in_row(batch, places), rows, 0)


def _elements(batch: TableBatch, places: Places, used: Tensor, otherwise: int) -> Tensor:
    """Where in the buffer each position's row lies -> int64 [N, widest]; `otherwise` where there is nothing."""
    local = places.row - batch.fields[:, TableColumn.FIRST_ROW][places.table]
    first = batch.fields[:, TableColumn.FIRST_ELEMENT][places.table]
    begin = first + local * batch.fields[:, TableColumn.DIM][places.table]
    columns = torch.arange(batch.shape.widest, device=begin.device)
    used = used[:, None] & _in_row(batch, places)
    return torch.where(used, begin[:, None] + columns, otherwise)


def _in_row(batch: TableBatch, places: Places) -> Tensor:
    """Which columns the table of each position has -> bool [N, widest]."""
    columns = torch.arange(batch.shape.widest, device=places.table.device)
    return columns < batch.fields[:, TableColumn.DIM][places.table][:, None]


def _columns(bag_rows: Tensor, batch: TableBatch) -> Tensor:
    """[T * B, widest], one row a bag -> the output [B, sum D]."""
    table, column = _table_and_column(batch)
    return bag_rows.view(batch.num_tables, -1, batch.shape.widest)[table, :, column].T.contiguous()


def _bag_rows(output: Tensor, batch: TableBatch) -> Tensor:
    """The output [B, sum D] -> [T * B, widest], one row a bag, zero behind its table's D."""
    table, column = _table_and_column(batch)
    rows = output.new_zeros(batch.num_tables, output.shape[0], batch.shape.widest)
    rows[table, :, column] = output.T
    return rows.flatten(0, 1)


def _table_and_column(batch: TableBatch) -> tuple[Tensor, Tensor]:
    """Whose each column of the output is, and its place there -> int64 [sum D] each."""
    table = batch.table_of_column.to(torch.int64)
    columns = torch.arange(batch.width, device=table.device)
    return table, columns - batch.fields[:, TableColumn.FIRST_COLUMN][table]
