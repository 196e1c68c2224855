"""Batched tables on the CPU: tables of one width are rows of one matrix, and torch's bags sum them at once.

The functions for the backend return None where an id is out of range or offsets are wrong: `tables` serves that call.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...dtypes import accumulation
from ...tables.batch import TableBatch
from ...tables.layout import MODES, TableColumn
from .bag import sums_16_bits_as_torch
from .lookup import torch_ids
from .sort import sort_ids

# Not numpy.typing, which every first lookup would import.
Integers = np.ndarray[Any, np.dtype[np.integer]]
Unsigned = np.ndarray[Any, np.dtype[np.uint64]]

# From so many ids on a feature is looked up alone: to number its ids anew would cost more than a call does.
ALONE = 4096
# Up to so many rows an id, all rows of a gradient are summed, rather than zeros written and sums put between them.
DENSE = 4
# Plans that are kept: one for each layer, and for each choice of features that are looked up alone.
PLANS = 64
SUM, MEAN, MAX = range(len(MODES))


class Group(NamedTuple):
    """F features of one mode whose tables' rows are rows of one matrix [V, D]."""

    number: int  # of this group among all
    features: list[int]
    places: slice  # of these features, in the order of all groups
    mode: int
    dim: int  # D
    first_element: int  # where in the buffer the matrix begins
    num_rows: int  # V
    # Its columns of an output, in pieces of `TableShape.dim_divisor`; None: all of them.
    pieces: Integers | None

    def bags(self, bags_per_table: int) -> slice:
        """Its bags among those of all groups, feature by feature."""
        return slice(self.places.start * bags_per_table, self.places.stop * bags_per_table)

    def matrix(self, buffer: Tensor) -> Tensor:
        """[V, D], in the memory of a buffer."""
        first = buffer.storage_offset() + self.first_element
        return buffer.as_strided((self.num_rows, self.dim), (self.dim, 1), first)

    def bag_rows(self, output: Tensor, batch: TableBatch) -> Tensor:
        """Its columns of an output [B, sum D], contiguous -> [B * F, D], bag b of the f-th feature at b * F + f."""
        if self.pieces is not None:
            in_pieces = output.numpy().reshape(len(output), -1, batch.shape.dim_divisor)
            output = torch.from_numpy(in_pieces.take(self.pieces, 1))
        return output.view(-1, self.dim)


class Plan(NamedTuple):
    """What follows from a layer's features alone; [T] each, and from `features` on in the order of the groups."""

    num_rows: Unsigned  # of each feature's table
    padding: Integers | None  # -1: none; None: no feature has any
    features: Integers | None  # None: in their own order
    first_rows: Integers | None  # where in its group's matrix each table begins; None: all at 0
    place: Integers  # of each feature in its group
    group_size: Integers  # of each feature's group
    groups: list[Group]


class Ids(NamedTuple):
    """The n ids of a batch that are in a bag, group by group."""

    rows: Integers  # [n]: each id's row of its group's matrix
    positions: Integers | slice  # [n]: where in the batch each id is
    begins: Integers  # [T * B + 1]: where each bag begins; those of a feature's B bags are adjacent
    bounds: list[int]  # where each group's ids begin, and where the last one's end
    plan: Plan

    def of(self, group: Group) -> slice:
        """Where in `rows` the ids of a group are."""
        return slice(*self.bounds[group.number : group.number + 2])

    def bag_of(self) -> Integers:
        """The row of each id's bag among its group's `bag_rows` -> [n]."""
        place, size = self.plan.place[:, None], self.plan.group_size[:, None]
        bags = np.arange((len(self.begins) - 1) // len(place))
        return np.repeat((bags * size + place).ravel(), np.diff(self.begins))

    def bag_values(self, group: Group, grad_output: Tensor, batch: TableBatch) -> Tensor:
        """What an id's row gets from each bag: `bag_rows` of the gradient, of means divided -> [B * F, D]."""
        if not batch.shape.pooled:
            return grad_output
        values = group.bag_rows(grad_output, batch)
        if group.mode != MEAN:
            return values
        sizes = np.diff(self.begins)[group.bags(batch.bags_per_table)].clip(1)
        return values / torch.from_numpy(sizes.reshape(len(group.features), -1).T.reshape(-1, 1))


def embedding(
    weight: Tensor, per_sample_weights: Tensor | None, batch: TableBatch, zero_padding: bool
) -> Tensor | None:
    """`Backend.table_batched_embedding` if all ids are in their tables."""
    if batch.shape.pooled:
        bags = _bags(weight, per_sample_weights, batch, False)
        return None if bags is None else bags[0]
    ids = _ids(batch, zero_padding)
    if ids is None:
        return None
    (group,) = ids.plan.groups
    rows = torch.embedding(group.matrix(weight.detach()), torch.from_numpy(ids.rows))
    rows = rows.to(batch.shape.output_dtype or weight.dtype)
    if len(rows) == len(batch.indices):
        return rows
    output = rows.new_zeros(len(batch.indices), batch.shape.widest)
    output[ids.positions] = rows
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
    """`Backend.table_batched_embedding_dense_backward` if all ids are in their tables, or those have no rows."""
    ids = _ids(batch, True, drop_empty=True)
    if ids is None:
        return None
    dtype = batch.shape.table_dtype or grad_output.dtype
    grad_output = grad_output.detach().to(accumulation(dtype)).contiguous()
    if batch.shape.pooled:
        source = ids.bag_of()
    else:
        source = np.arange(len(grad_output))[ids.positions]
    # One sort for all groups: the rows of each are numbered from the end of those before it.
    rows, groups = ids.rows, ids.plan.groups
    num_rows, first = np.array([group.num_rows for group in groups]), groups[0]
    if len(groups) > 1:
        rows = rows + np.repeat(num_rows.cumsum() - num_rows, np.diff(ids.bounds))
    runs, scales = _runs(rows, int(num_rows.sum())), None
    source = source[runs.order]
    if per_sample_weights is not None:
        scales = per_sample_weights.to(grad_output.dtype)[ids.positions][runs.order]
    max_rows = _max_rows(ids, batch)
    is_dense = len(groups) == 1 and first.num_rows <= DENSE * len(rows)
    # A last table that has no rows is none of its group's matrix.
    is_dense = is_dense and first.num_rows == weight_shape[0]
    if into is None and dtype == grad_output.dtype and max_rows is None and is_dense:
        # Every row is a run, if an empty one: the sums are the gradient, which is not filled with zeros first.
        counts = np.bincount(rows, minlength=first.num_rows)
        values = ids.bag_values(first, grad_output, batch)
        return _sums(values, source, counts.cumsum() - counts, scales).view(weight_shape)
    grad_weight = grad_output.new_zeros(weight_shape, dtype=dtype) if into is None else into
    used = ids.rows[runs.order[runs.begins]]
    bounds = np.searchsorted(runs.begins, ids.bounds).tolist()
    for group in groups:
        matrix, values = group.matrix(grad_weight), ids.bag_values(group, grad_output, batch)
        if group.mode == MAX and max_rows is not None:
            _add_maxima(matrix, group.bag_rows(max_rows, batch), values, into is None)
            continue
        own, own_runs = ids.of(group), slice(*bounds[group.number : group.number + 2])
        if own.start < own.stop:
            begins = runs.begins[own_runs] - own.start
            own_scales = None if scales is None else scales[own]
            sums = _sums(values, source[own], begins, own_scales)
            _add_rows(matrix, used[own_runs], sums, into is None)
    return grad_weight


def sample_weights_backward(
    grad_output: Tensor, weight: Tensor, batch: TableBatch
) -> Tensor | None:
    """`Backend.table_batched_embedding_sample_weights_backward` if all ids are in their tables."""
    ids = _ids(batch, True)
    if ids is None:
        return None
    wide = accumulation(weight.dtype)
    grad_output = grad_output.detach().to(wide).contiguous()
    bag_of, products = ids.bag_of(), grad_output.new_empty(len(ids.rows))
    for group in ids.plan.groups:
        own = ids.of(group)
        rows = group.matrix(weight.detach())[ids.rows[own]].to(wide)
        values = group.bag_rows(grad_output, batch)[bag_of[own]]
        products[own] = (rows * values).sum(1)
    grad = weight.new_zeros(len(batch.indices))
    grad[ids.positions] = products.to(grad.dtype)
    return grad


def _bags(
    weight: Tensor, per_sample_weights: Tensor | None, batch: TableBatch, with_argmax: bool
) -> tuple[Tensor, Tensor] | None:
    """The output [B, sum D], and of the maxima in it the positions if with_argmax."""
    ids = _ids(batch, True, ALONE)
    if ids is None:
        return None
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights[ids.positions]
    # A view of a parameter requires a gradient, and then torch notes each id's bag, even where none is recorded.
    weight, max_rows = weight.detach(), _max_rows(ids, batch)
    dtype = batch.shape.output_dtype or weight.dtype
    num_bags = [len(group.features) * batch.bags_per_table for group in ids.plan.groups]
    begins_in_group = ids.begins[:-1] - np.repeat(ids.bounds[:-1], num_bags)
    begins_in_group = begins_in_group.astype(ids.rows.dtype, copy=False)
    outputs, argmax = [weight] * batch.num_tables, [weight] * batch.num_tables
    for group in ids.plan.groups:
        own, places = ids.of(group), None
        begins = torch.from_numpy(begins_in_group[group.bags(batch.bags_per_table)])
        if group.mode == MAX and max_rows is not None:
            bags = _at_rows(group, weight, group.bag_rows(max_rows, batch))
        elif own.start == own.stop:
            bags = weight.new_zeros(len(begins), group.dim)
        else:
            scales = None if per_sample_weights is None else per_sample_weights[own]
            try:
                bags, places = _group_bags(weight, scales, ids, group, begins, with_argmax, dtype)
            except (IndexError, RuntimeError):
                return None
        _hand_out(bags.to(dtype), group, outputs)
        if with_argmax and places is not None:
            positions = torch.arange(len(batch.indices), dtype=batch.position_dtype, device="cpu")
            positions = torch.cat([positions[ids.positions][own], positions.new_full((1,), -1)])
            _hand_out(positions[places], group, argmax)
        elif with_argmax:
            _hand_out(torch.full_like(bags, -1, dtype=batch.position_dtype), group, argmax)
    output = torch.cat(outputs, 1)
    if not with_argmax:
        return output, output.new_empty(0, dtype=batch.position_dtype)
    return output, torch.cat(argmax, 1)


def _hand_out(bags: Tensor, group: Group, outputs: list[Tensor]) -> None:
    """Set the output [B, D] of each of a group's features, given [F * B, D]."""
    if len(group.features) == 1:
        outputs[group.features[0]] = bags
        return
    by_feature = bags.split(len(bags) // len(group.features))
    for feature, output in zip(group.features, by_feature, strict=True):
        outputs[feature] = output


def _group_bags(
    weight: Tensor,
    scales: Tensor | None,
    ids: Ids,
    group: Group,
    begins: Tensor,
    with_argmax: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The output [F * B, D] of a group, and for maxima with_argmax the place of each among its ids, -1: none.

    Args:
        scales: of these ids, the per-sample weights.
        begins: where among them each bag begins.
        dtype: of the output.
    """
    matrix, rows = group.matrix(weight), torch.from_numpy(ids.rows[ids.of(group)])
    # torch names the row of a maximum and not its place.
    names_row, mode = group.mode == MAX and with_argmax, MODES[group.mode]
    is_wide = weight.dtype.itemsize == 2 and not (
        dtype == weight.dtype and sums_16_bits_as_torch(dtype, mode)
    )
    if names_row or is_wide:
        matrix, rows = (
            matrix.index_select(0, rows),
            torch.arange(len(rows), dtype=rows.dtype, device="cpu"),
        )
    if is_wide:
        matrix = matrix.to(accumulation(weight.dtype))
        scales = None if scales is None else scales.to(matrix.dtype)
    bags, _, sizes, places = torch.embedding_bag(
        matrix, rows, begins, False, group.mode, False, scales
    )
    return bags.to(dtype), torch.where(sizes[:, None] > 0, places, -1) if names_row else None


def _at_rows(group: Group, weight: Tensor, rows: Tensor) -> Tensor:
    """Of each element of a group's `bag_rows` what stands in the given row, 0 at -1 -> [F * B, D]."""
    elements = rows.clamp(min=0) * group.dim + torch.arange(group.dim, device="cpu")
    values = torch.where(rows >= 0, group.matrix(weight).view(-1)[elements], 0)
    return values.view(-1, len(group.features), group.dim).transpose(0, 1).flatten(0, 1)


def _max_rows(ids: Ids, batch: TableBatch) -> Tensor | None:
    """What `batch.max_positions` names, as rows of the groups' matrices -> [B, sum D]; -1: no id of the bag."""
    if batch.max_positions is None:
        return None
    num_ids, bags_per_table = len(batch.indices), batch.bags_per_table
    row_at, bag_at = np.full((2, num_ids + 1), -1)
    row_at[:-1][ids.positions] = ids.rows
    bag_at[:-1][ids.positions] = np.repeat(np.arange(batch.bags.num_bags), np.diff(ids.begins))
    # A negative position is a large unsigned one.
    positions = batch.max_positions.numpy()
    positions = np.minimum(positions.view(f"u{positions.itemsize}"), num_ids).view(positions.dtype)
    columns = batch.table_of_column.numpy()
    if ids.plan.features is not None:
        columns = ids.plan.features.argsort()[columns]
    bags = columns.astype(np.int64) * bags_per_table + np.arange(bags_per_table)[:, None]
    return torch.from_numpy(np.where(bag_at[positions] == bags, row_at[positions], -1))


def _ids(
    batch: TableBatch, drop_padding: bool, alone: float = np.inf, drop_empty: bool = False
) -> Ids | None:
    """The ids that are in a bag, by groups; a feature of at least `alone` ids is one of its own.

    Args:
        drop_empty: without those of tables without rows, as a gradient has frozen ones.

    None: an id is out of range, offsets are wrong, or rows of different widths are looked up without sums.
    """
    num_bags, pooled = batch.bags_per_table, batch.shape.pooled
    indices, begins = torch_ids(batch.indices).numpy(), batch.offsets.numpy()
    begins = begins.astype(np.int64, copy=False)
    if begins[0] != 0 or begins[-1] > len(indices) or (begins[1:] < begins[:-1]).any():
        return None
    rows, first_ids = indices[: begins[-1]], begins[::num_bags]
    num_ids = np.diff(first_ids)
    is_alone = num_ids >= alone
    shape = batch.shape.widest, batch.shape.dim_divisor, pooled
    plan = _plan(batch.fields.numpy().tobytes(), *shape, is_alone.tobytes())
    positions: Integers | slice = slice(len(rows))
    if drop_empty and not plan.num_rows.all():
        positions = np.flatnonzero(np.repeat(plan.num_rows > 0, num_ids))
        begins, rows = np.searchsorted(positions, begins), rows[positions]
        first_ids = begins[::num_bags]
        num_ids = np.diff(first_ids)
    # Of a feature that is looked up alone torch looks at the ids.
    is_checked = is_alone.all() or _in_range(rows, first_ids, num_ids, plan.num_rows)
    if not is_checked or not (pooled or batch.is_uniform):
        return None
    if drop_padding and plan.padding is not None:
        kept = np.flatnonzero(rows != np.repeat(plan.padding, num_ids))
        if len(kept) < len(rows):
            begins = np.searchsorted(kept, begins)
            rows, first_ids = rows[kept], begins[::num_bags]
            positions = kept if isinstance(positions, slice) else positions[kept]
            num_ids = np.diff(first_ids)
    if plan.features is not None:
        lengths = np.diff(begins).reshape(-1, num_bags)[plan.features].ravel()
        begins, from_ids = np.append(0, lengths.cumsum()), first_ids[plan.features]
        num_ids, first_ids = num_ids[plan.features], begins[::num_bags]
        moved = np.arange(len(rows)) + np.repeat(from_ids - first_ids[:-1], num_ids)
        rows = rows[moved]
        positions = moved if isinstance(positions, slice) else positions[moved]
    if plan.first_rows is not None:
        rows = rows + np.repeat(plan.first_rows, num_ids)
    bounds = begins[[*(group.places.start * num_bags for group in plan.groups), -1]].tolist()
    return Ids(rows, positions, begins, bounds, plan)


@lru_cache(PLANS)
def _plan(fields: bytes, widest: int, dim_divisor: int, pooled: bool, is_alone: bytes) -> Plan:
    """The groups of features, given the bytes of `TableBatch.fields`, and of which are looked up alone."""
    of_features = np.frombuffer(fields, np.int64).reshape(-1, len(TableColumn))
    num_rows, padding = (
        of_features[:, column] for column in (TableColumn.NUM_ROWS, TableColumn.PADDING_IDX)
    )
    columns = TableColumn.DIM, TableColumn.FIRST_ELEMENT, TableColumn.FIRST_COLUMN
    dim, element, column = (of_features[:, number] for number in columns)
    mode, count = of_features[:, TableColumn.MODE] * pooled, len(of_features)
    # Matrices of one width begin at different places of a row, as tables begin at multiples of 8 elements alone.
    key = (dim * (widest + 1) + element % dim) * len(MODES) + mode
    key = np.where(np.frombuffer(is_alone, bool), np.arange(-count, 0), key)
    features = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[features], prepend=key.min() - 1))
    sizes = np.diff(starts, append=count)
    base = np.minimum.reduceat(element[features], starts)
    first_rows = (element[features] - np.repeat(base, sizes)) // dim[features]
    heights = np.maximum.reduceat(first_rows + num_rows[features], starts)
    groups: list[Group] = []
    for start, size, first_element, height in zip(
        *(numbers.tolist() for numbers in (starts, sizes, base, heights)), strict=True
    ):
        own = features[start : start + size]
        width, pieces = int(dim[own[0]]), None
        if size < count:
            pieces = column[own, None] // dim_divisor + np.arange(width // dim_divisor)
            pieces = pieces.ravel()
        shape = int(mode[own[0]]), width, first_element, height
        places = slice(start, start + size)
        groups.append(Group(len(groups), own.tolist(), places, *shape, pieces))
    return Plan(
        num_rows.astype(np.uint64),
        padding if (padding >= 0).any() else None,
        features if (features != np.arange(count)).any() else None,
        first_rows if first_rows.any() else None,
        np.arange(count) - np.repeat(starts, sizes),
        np.repeat(sizes, sizes),
        groups,
    )


def _in_range(ids: Integers, first_ids: Integers, num_ids: Integers, num_rows: Unsigned) -> bool:
    """Whether every id is in its table."""
    used = np.flatnonzero(num_ids)
    if len(used) == 0:
        return True
    # A negative id is a large unsigned one.
    highest = np.maximum.reduceat(ids.view(f"u{ids.itemsize}"), first_ids[used])
    return bool((highest < num_rows[used]).all())


class Runs(NamedTuple):
    """Ids with equal ones side by side."""

    order: Integers  # [n]: where each was, of equal ones the first first
    begins: Integers  # where in this order each id begins


def _runs(ids: Integers, num_rows: int) -> Runs:
    """Sort ids of a table in ascending order."""
    # Keys for twice as many rows do not wrap around, which would change the order of groups.
    keys, order = sort_ids(torch.from_numpy(ids), 2 * num_rows)
    sorted_keys = keys.numpy()
    is_begin = np.ones(len(ids), bool)
    np.not_equal(sorted_keys[1:], sorted_keys[:-1], out=is_begin[1:])
    return Runs(order.numpy(), np.flatnonzero(is_begin))


def _sums(values: Tensor, source: Integers, begins: Integers, scales: Tensor | None) -> Tensor:
    """Of rows source[n] of `values`, times scales[n], the sum from each of `begins` to the next."""
    arguments = values, torch.from_numpy(source), torch.from_numpy(begins)
    sums, *_ = torch.embedding_bag(*arguments, False, SUM, False, scales)
    return sums


def _add_maxima(matrix: Tensor, rows: Tensor, values: Tensor, is_new: bool) -> None:
    """Add each element of `values` [M, D] to its column of the given row [M, D], -1: none; the rest as `_add_rows`."""
    of_values, dim = rows.numpy(), matrix.shape[1]
    places = np.flatnonzero(of_values >= 0)
    elements = (of_values * dim + np.arange(dim)).ravel()[places]
    if matrix.dtype == values.dtype:
        added = values.view(-1)[torch.from_numpy(places)]
        matrix.view(-1).scatter_add_(0, torch.from_numpy(elements), added)
        return
    runs = _runs(elements, matrix.numel())
    sums = _sums(values.view(-1, 1), places[runs.order], runs.begins, None)
    _add_rows(matrix.view(-1, 1), elements[runs.order[runs.begins]], sums, is_new)


def _add_rows(matrix: Tensor, used: Integers, sums: Tensor, is_new: bool) -> None:
    """Add to rows of a matrix, each named once; is_new: it holds zeros."""
    rows = torch.from_numpy(used).to(torch.int64)
    if not is_new:
        sums += matrix.index_select(0, rows)
    matrix.index_copy_(0, rows, sums.to(matrix.dtype))
