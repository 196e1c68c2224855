"""Batched tables on the CPU: tables of one width are rows of one matrix, and torch's bags sum them at once.

The functions for the backend return None where an id is out of range or offsets are wrong: `tables` serves that call.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...dtypes import accumulation
from ...tables.batch import TableBatch
from ...tables.layout import MODES, TableColumn
from .lookup import torch_ids

Integers = NDArray[np.integer]

# From so many ids on a feature is looked up alone: to number its ids anew would cost more than a call does.
ALONE = 1024
SUM, MEAN, MAX = range(len(MODES))


class Group(NamedTuple):
    """Features of one mode whose tables' rows are rows of one matrix, with their ids in bags."""

    features: Integers  # [F]
    mode: int
    dim: int
    first_element: int  # where in the buffer the matrix begins
    num_rows: int  # of the matrix
    rows: Integers  # [n]: each id's row of the matrix
    positions: Integers | slice  # [n]: where in the batch each id is
    begins: Integers  # [F * B + 1]: where in `rows` each bag begins; bag f * B + b is bag b of the f-th feature
    has_all: bool  # whether all features are in this group

    def matrix(self, buffer: Tensor) -> Tensor:
        """[num_rows, D], in the memory of a buffer."""
        first = buffer.storage_offset() + self.first_element
        return buffer.as_strided((self.num_rows, self.dim), (self.dim, 1), first)

    def sizes(self) -> Integers:
        """Ids of each bag -> [B * F], bag b of the f-th feature at b * F + f."""
        return np.diff(self.begins).reshape(len(self.features), -1).T.ravel()

    def bag_of(self) -> Integers:
        """The bag of each id, as `sizes` numbers them -> [n]."""
        lengths = np.diff(self.begins)
        return np.repeat(np.arange(len(lengths)).reshape(-1, len(self.features)).T.ravel(), lengths)

    def bag_rows(self, output: Tensor, batch: TableBatch) -> Tensor:
        """Its columns of an output [B, sum D] -> [B * F, D], one row a bag."""
        output = output.contiguous()
        if not self.has_all:
            # All features begin at a multiple of the divisor.
            chunk = batch.shape.dim_divisor
            first = batch.fields.numpy()[self.features, TableColumn.FIRST_COLUMN] // chunk
            chunks = (first[:, None] + np.arange(self.dim // chunk)).ravel()
            by_chunk = output.numpy().reshape(len(output), -1, chunk)
            output = torch.from_numpy(by_chunk.take(chunks, 1))
        return output.view(-1, self.dim)


def embedding(
    weight: Tensor, per_sample_weights: Tensor | None, batch: TableBatch, zero_padding: bool
) -> Tensor | None:
    """`Backend.table_batched_embedding` if all ids are in their tables."""
    if batch.shape.pooled:
        bags = _bags(weight, per_sample_weights, batch, False)
        return None if bags is None else bags[0]
    found = _groups(batch, zero_padding)
    if found is None:
        return None
    (group,) = found
    rows = torch.embedding(group.matrix(weight), torch.from_numpy(group.rows))
    if len(rows) == len(batch.indices):
        return rows
    output = weight.new_zeros(len(batch.indices), batch.shape.widest)
    output[group.positions] = rows
    return output


def embedding_max(
    weight: Tensor, batch: TableBatch, with_argmax: bool
) -> tuple[Tensor, Tensor] | None:
    """`Backend.table_batched_embedding_max` if all ids are in their tables."""
    return _bags(weight, None, batch, with_argmax)


def dense_backward(
    grad_output: Tensor,
    per_sample_weights: Tensor | None,
    batch: TableBatch,
    weight_shape: tuple[int, ...],
    into: Tensor | None,
) -> Tensor | None:
    """`Backend.table_batched_embedding_dense_backward` if all ids are in their tables."""
    found = _groups(batch, True)
    if found is None:
        return None
    grad_weight = grad_output.new_zeros(weight_shape) if into is None else into
    grad_output = grad_output.to(accumulation(grad_output.dtype))
    for group in found:
        matrix, rows, scales = group.matrix(grad_weight), group.rows, None
        if not batch.shape.pooled:
            values, source = grad_output, np.arange(len(grad_output))[group.positions]
        elif group.mode == MAX and batch.max_positions is not None:
            elements, taken = _max_elements(batch, batch.max_positions, group)
            source = np.flatnonzero(taken)
            matrix, rows = matrix.view(-1, 1), elements.ravel()[source]
            values = group.bag_rows(grad_output, batch).view(-1, 1)
        else:
            values, source = group.bag_rows(grad_output, batch), group.bag_of()
        if group.mode == MEAN:
            values = values / torch.from_numpy(group.sizes().clip(1))[:, None]
        if per_sample_weights is not None:
            scales = per_sample_weights[group.positions].to(values.dtype)
        _add_sums(matrix, rows, values, source, scales, into is None)
    return grad_weight


def sample_weights_backward(grad_output: Tensor, weight: Tensor, batch: TableBatch) -> Tensor | None:
    """`Backend.table_batched_embedding_sample_weights_backward` if all ids are in their tables."""
    found = _groups(batch, True)
    if found is None:
        return None
    wide = accumulation(weight.dtype)
    grad_output = grad_output.to(wide)
    grad = grad_output.new_zeros(len(batch.indices))
    for group in found:
        values = group.bag_rows(grad_output, batch)[group.bag_of()]
        rows = group.matrix(weight)[group.rows].to(wide)
        grad[group.positions] = (rows * values).sum(1)
    return grad.to(weight.dtype)


def _bags(
    weight: Tensor, per_sample_weights: Tensor | None, batch: TableBatch, with_argmax: bool
) -> tuple[Tensor, Tensor] | None:
    """The output [B, sum D], and of the maxima in it the positions if with_argmax."""
    found = _groups(batch, True, ALONE)
    if found is None:
        return None
    outputs, positions = [weight] * batch.num_tables, [weight] * batch.num_tables
    for group in found:
        bags, argmax = _group_bags(weight, per_sample_weights, batch, group, with_argmax)
        shape = len(group.features), batch.bags_per_table, group.dim
        for feature, of_feature in zip(group.features, bags.view(shape).unbind(), strict=True):
            outputs[feature] = of_feature
        if with_argmax:
            for feature, of_feature in zip(
                group.features, argmax.view(shape).unbind(), strict=True
            ):
                positions[feature] = of_feature
    output = torch.cat(outputs, 1)
    if not with_argmax:
        return output, output.new_empty(0, dtype=batch.position_dtype)
    return output, torch.cat(positions, 1)


def _group_bags(
    weight: Tensor,
    per_sample_weights: Tensor | None,
    batch: TableBatch,
    group: Group,
    with_argmax: bool,
) -> tuple[Tensor, Tensor]:
    """[F * B, D] each; the second is -1 but in a group of maxima, and then if with_argmax."""
    dtype, matrix = weight.dtype, group.matrix(weight)
    begins = torch.from_numpy(group.begins[:-1].astype(group.rows.dtype))
    positions = torch.full((), -1, dtype=batch.position_dtype).expand(len(begins), group.dim)
    if len(group.rows) == 0:
        return weight.new_zeros(positions.shape), positions
    if group.mode == MAX and batch.max_positions is not None:
        elements, taken = _max_elements(batch, batch.max_positions, group)
        values = torch.where(torch.from_numpy(taken), matrix.view(-1)[elements], 0)
        return values.transpose(0, 1).flatten(0, 1), positions
    rows = torch.from_numpy(group.rows)
    # torch names a maximum's row and not its position, and would round a 16-bit mean twice.
    if with_argmax and group.mode == MAX or group.mode == MEAN and dtype.itemsize == 2:
        matrix = matrix[rows].to(accumulation(dtype)) if group.mode == MEAN else matrix[rows]
        rows = torch.arange(len(rows))
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights[group.positions]
    bags, _, sizes, largest = torch.embedding_bag(
        matrix, rows, begins, False, group.mode, False, per_sample_weights
    )
    if with_argmax and group.mode == MAX:
        in_batch = torch.arange(len(batch.indices), dtype=batch.position_dtype)[group.positions]
        positions = torch.where(sizes[:, None] > 0, in_batch[largest], -1)
    return bags.to(dtype), positions


def _groups(
    batch: TableBatch, drop_padding: bool, alone: float = np.inf
) -> list[Group] | None:
    """The ids that are in a bag, by groups; a feature of at least `alone` ids is one of its own.

    None: an id is out of range, offsets are wrong, or rows of different widths are looked up without sums.
    """
    fields, num_bags, pooled = batch.fields.numpy(), batch.bags_per_table, batch.shape.pooled
    ids, begins = torch_ids(batch.indices).numpy(), batch.offsets.numpy().astype(np.int64)
    lengths = np.diff(begins)
    if begins[0] != 0 or begins[-1] > len(ids) or lengths.min() < 0:
        return None
    ids, first_id = ids[: begins[-1]], begins[::num_bags]
    num_ids = np.diff(first_id)
    if not (pooled or batch.is_uniform) or not _in_range(ids, first_id, fields):
        return None
    positions = None
    padding = fields[:, TableColumn.PADDING_IDX]
    if drop_padding and padding.max() >= 0:
        kept = ids != np.repeat(padding, num_ids)
        if not kept.all():
            begins = np.concatenate([[0], kept.cumsum()])[begins]
            positions = np.flatnonzero(kept)
            ids, first_id = ids[positions], begins[::num_bags]
            num_ids = np.diff(first_id)
    dim, element = fields[:, TableColumn.DIM], fields[:, TableColumn.FIRST_ELEMENT]
    mode = fields[:, TableColumn.MODE] * pooled
    key = (dim * (batch.shape.widest + 1) + element % dim) * len(MODES) + mode
    key = np.where(num_ids >= alone, np.arange(-len(key), 0), key)
    order = np.argsort(key, kind="stable")
    if (order[1:] < order[:-1]).any():
        lengths = np.diff(begins).reshape(-1, num_bags)[order].ravel()
        begins, from_id = np.concatenate([[0], lengths.cumsum()]), first_id[order]
        num_ids, first_id = num_ids[order], begins[::num_bags]
        moved = np.arange(len(ids)) + np.repeat(from_id - first_id[:-1], num_ids)
        ids, positions = ids[moved], moved if positions is None else positions[moved]
        fields, key = fields[order], key[order]
        dim, element, mode = dim[order], element[order], mode[order]
    starts = np.flatnonzero(np.diff(key, prepend=key[0] - 1))
    ends = np.append(starts[1:], len(key))
    base = np.minimum.reduceat(element, starts)
    first_row = (element - np.repeat(base, ends - starts)) // dim
    if first_row.any():
        ids = ids + np.repeat(first_row, num_ids)
    num_rows = np.maximum.reduceat(first_row + fields[:, TableColumn.NUM_ROWS], starts)
    groups = []
    for start, end, *matrix in zip(*(x.tolist() for x in (starts, ends, base, num_rows)), strict=True):
        a, b = int(first_id[start]), int(first_id[end])
        groups.append(
            Group(
                order[start:end],
                int(mode[start]),
                int(dim[start]),
                *matrix,
                ids[a:b],
                slice(a, b) if positions is None else positions[a:b],
                begins[start * num_bags : end * num_bags + 1] - a,
                len(starts) == 1,
            )
        )
    return groups


def _in_range(ids: Integers, first_id: Integers, fields: Integers) -> bool:
    """Whether every id is in its table."""
    used = np.flatnonzero(np.diff(first_id))
    if len(used) == 0:
        return True
    # A negative id is a large unsigned one.
    highest = np.maximum.reduceat(ids.view(f"u{ids.itemsize}"), first_id[used])
    return bool((highest < fields[used, TableColumn.NUM_ROWS].astype(np.uint64)).all())


def _max_elements(
    batch: TableBatch, max_positions: Tensor, group: Group
) -> tuple[Integers, NDArray[np.bool_]]:
    """Where in the group's matrix the maxima are, and which are ids of their bags -> [B, F, D] each."""
    num_ids, shape = len(batch.indices), (-1, len(group.features), group.dim)
    places = group.bag_rows(max_positions, batch).numpy().reshape(shape)
    places = np.where((places >= 0) & (places < num_ids), places, num_ids)
    row_at, bag_at = np.zeros(num_ids + 1, np.int64), np.full(num_ids + 1, -1)
    row_at[group.positions], bag_at[group.positions] = group.rows, group.bag_of()
    bags = np.arange(len(group.begins) - 1).reshape(-1, len(group.features), 1)
    return row_at[places] * group.dim + np.arange(group.dim), bag_at[places] == bags


def _add_sums(
    matrix: Tensor,
    rows: Integers,
    values: Tensor,
    source: Integers,
    scales: Tensor | None,
    is_new: bool,
) -> None:
    """Add row source[n] of `values`, times scales[n], to row rows[n] of a matrix for all n.

    Args:
        is_new: whether the matrix holds zeros, and so need not be read.
    """
    if len(rows) == 0:
        return
    # A sort of numbers takes a tenth of the time of a stable sort of rows.
    bits = len(rows).bit_length()
    if len(matrix) < 1 << (63 - bits):
        keys = np.sort(rows.astype(np.int64) << bits | np.arange(len(rows)))
        order, rows = keys & (1 << bits) - 1, keys >> bits
    else:
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
    begins = np.flatnonzero(np.diff(rows, prepend=-1))
    used = torch.from_numpy(rows[begins])
    if scales is not None:
        scales = scales[order]
    # The runs are bags of values, which are read in place.
    total, *_ = torch.embedding_bag(
        values, torch.from_numpy(source[order]), torch.from_numpy(begins), False, SUM, False, scales
    )
    if not is_new:
        total += matrix[used]
    matrix[used] = total.to(matrix.dtype)
