"""The formulas of `RowUpdate` in torch's operators, for the torch backend."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...bounds import all_in_table, in_table
from ...dtypes import accumulation
from ...row_update import STATE, RowUpdate, Stream
from ...tables.entries import TableEntries
from ...tables.layout import MODES, TableColumn
from .sort import sort_ids

LOW = 0xFFFFFFFF


def row_update_(
    update: RowUpdate,
    weight: Tensor,
    state: tuple[Tensor, ...],
    indices: Tensor,
    values: Tensor,
    rows: Tensor | None,
) -> None:
    """`Backend.row_update_`; on CUDA it waits to learn how many rows there are."""
    sums = _row_sums(weight.shape[0], indices, values.to(accumulation(weight.dtype)), rows)
    w = weight.index_select(0, sums.used)
    kept_state = [tensor.index_select(0, sums.used) for tensor in state]
    _write_rows(weight, sums.used, _updated(update, w, kept_state, sums, w.shape[1]))
    for tensor, new in zip(state, kept_state, strict=True):
        _write_rows(tensor, sums.used, new)


def _write_rows(table: Tensor, rows: Tensor, new: Tensor) -> None:
    """table[rows] = new, 16 bytes at a time where rows consist of them: torch copies element by element."""
    places = (table.shape[-1], table.stride(0), table.storage_offset())
    in_words = all(place * table.itemsize % 16 == 0 for place in places)
    if table.dim() == 2 and table.stride(1) == 1 and in_words:
        table, new = table.view(torch.complex128), new.view(torch.complex128)
    table.index_copy_(0, rows, new)


def table_row_update_(
    update: RowUpdate,
    weight: Tensor,
    state: tuple[Tensor, ...],
    entries: TableEntries,
    rows: Tensor | None,
) -> None:
    """`Backend.table_row_update_`; on CUDA it waits to learn how many rows there are.

    The tables of one D at a time, whose rows are then a matrix.
    """
    per_row = [False] + [layout.per_row for layout in STATE[update.formula]]
    entries = entries._replace(values=entries.values.contiguous())
    dims = entries.field(TableColumn.DIM)
    for dim in dims.unique().tolist():
        positions = (dims == dim).nonzero()[:, 0]
        ids = entries.rows.index_select(0, positions)
        sums = _row_sums(entries.num_rows, ids, _values_of(entries, positions, dim), rows)
        # Any entry of a row tells its table.
        output_bag = entries.output_bag[positions.index_select(0, sums.entry)]
        of_rows = entries._replace(rows=sums.used, output_bag=output_bag)
        row = sums.used - of_rows.field(TableColumn.FIRST_ROW)
        begin = of_rows.field(TableColumn.FIRST_ELEMENT) + row * dim
        size = _piece_size(entries, dim, TableColumn.FIRST_ELEMENT, weight)
        pieces = _pieces(begin, dim, size)
        buffers = [
            (tensor, sums.used) if is_row else (tensor.view(-1, size), pieces)
            for tensor, is_row in zip((weight, *state), per_row, strict=True)
        ]
        w, *kept_state = (
            tensor.index_select(0, places).view(-1, *[] if is_row else [dim])
            for (tensor, places), is_row in zip(buffers, per_row, strict=True)
        )
        w = _updated(update, w, kept_state, sums, dim)
        for (tensor, places), new in zip(buffers, (w, *kept_state), strict=True):
            _write_rows(tensor, places, new.view(-1, *tensor.shape[1:]))


def _values_of(entries: TableEntries, positions: Tensor, dim: int) -> Tensor:
    """`TableEntries.row_values` of the entries [n] of tables of one D, which have a meaning where those take part."""
    output_bag = entries.output_bag.index_select(0, positions)
    chosen = entries._replace(output_bag=output_bag)
    bag = output_bag.to(torch.int64) // entries.num_tables
    begin = bag * entries.values.shape[1] + chosen.field(TableColumn.FIRST_COLUMN)
    size = _piece_size(entries, dim, TableColumn.FIRST_COLUMN, entries.values[0])
    pieces = _pieces(begin, dim, size)

    def gathered(of_output: Tensor) -> Tensor:
        return of_output.reshape(-1, size).index_select(0, pieces).view(-1, dim)

    values = gathered(entries.values).to(accumulation(entries.values.dtype))
    if entries.max_positions is not None:
        is_max = chosen.field(TableColumn.MODE) == MODES.index("max")
        is_argmax = gathered(entries.max_positions) == positions[:, None]
        values = torch.where(is_argmax | ~is_max[:, None], values, 0)
    if entries.scales is not None:
        values = values * entries.scales.index_select(0, positions)[:, None]
    return values


def _piece_size(entries: TableEntries, dim: int, column: TableColumn, buffer: Tensor) -> int:
    """The largest number that divides D, where its tables begin in a buffer, and how long that is."""
    begins = entries.fields[entries.fields[:, TableColumn.DIM] == dim][:, column]
    return math.gcd(dim, buffer.numel(), *begins.tolist())


def _pieces(begin: Tensor, dim: int, size: int) -> Tensor:
    """The pieces of which rows [n, D] consist that begin at these elements -> int64 [n * D / size]."""
    return (begin[:, None] // size + torch.arange(dim // size, device=begin.device)).view(-1)


class RowSums(NamedTuple):
    """The rows that have a gradient."""

    used: Tensor  # int64 [U], each once
    entry: Tensor  # int64 [U]: the first of each one's values
    total: Tensor  # [U, D]: their sum; a new tensor


def _row_sums(num_rows: int, indices: Tensor, values: Tensor, rows: Tensor | None) -> RowSums:
    positions = None
    if rows is not None or indices.numel() == 0 or not all_in_table(indices, num_rows):
        kept = in_table(indices, num_rows)
        if rows is not None:
            kept &= rows[torch.where(kept, indices, 0)]
        positions = kept.nonzero()[:, 0]
    ids = indices if positions is None else indices.index_select(0, positions)
    if ids.numel() == 0:
        return RowSums(ids, ids, values.new_zeros(0, values.shape[1]))
    keys, order = sort_ids(ids, num_rows)
    order = order if positions is None else positions.index_select(0, order)
    _, counts = torch.unique_consecutive(keys, return_counts=True)
    begin = counts.cumsum(0) - counts
    entry = order.index_select(0, begin)
    # The runs are bags of values, which are read in place: a tenth of the time of sorting or scattering them.
    total, *_ = torch.embedding_bag(values, order, begin)
    return RowSums(indices.index_select(0, entry).to(torch.int64), entry, total)


def _updated(
    update: RowUpdate, w: Tensor, state: list[Tensor], sums: RowSums, dim: int | Tensor
) -> Tensor:
    """What becomes of rows w [U, D]; state and sums are changed in place. dim: D, or that of each row."""
    dtype, g = w.dtype, sums.total
    if update.grad_scale != 1:
        g.mul_(update.grad_scale)
    w = w.to(g.dtype)
    if update.weight_decay:
        g.add_(w * update.weight_decay)
    FORMULAS[update.formula](update, w, state, g, dim)
    if update.stream is not None and update.rounds_at_random(dtype):
        w = ROUNDINGS[dtype](w, _random_words(sums.used, w.shape[1], update.stream))
    return w.to(dtype)


# Each changes w, the state and g in place. An `alpha=` would fuse, and so round once less.


def _sgd(u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor) -> None:
    w.sub_(g.mul_(_times_lr(u.step_size, u)))


def _momentum(u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor) -> None:
    buffer = state[0].mul_(u.momentum).add_(g.mul_(u.avg_weight))
    w.sub_(buffer * _times_lr(u.step_size, u))


def _nesterov(u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor) -> None:
    buffer = state[0].mul_(u.momentum).add_(g * u.avg_weight)
    w.sub_(g.add_(buffer * u.momentum).mul_(_times_lr(u.step_size, u)))


def _adagrad(u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor) -> None:
    total = state[0].add_(g * g)
    w.sub_(g.div_(_square_root(total).add_(u.eps)).mul_(_times_lr(u.step_size, u)))


def _rowwise_adagrad(
    u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor
) -> None:
    total = state[0].add_((g * g).sum(1) / dim)
    step_size = torch.as_tensor(
        _times_lr(u.step_size, u), dtype=torch.float64, device=total.device
    ).to(total.dtype)
    w.sub_(g.mul_((step_size / _square_root(total).add_(u.eps))[:, None]))


def _adam(u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor) -> None:
    avg, sq = state
    avg.add_((g - avg).mul_(u.avg_weight))
    sq.add_(g.mul_(g).sub_(sq).mul_(u.sq_weight))
    if u.decay:
        w.mul_(1 - _times_lr(u.decay, u))
    w.sub_((avg / _square_root(sq).add_(u.eps)).mul_(_times_lr(u.step_size, u)))


Formula = Callable[[RowUpdate, Tensor, list[Tensor], Tensor, int | Tensor], None]
FORMULAS: dict[str, Formula] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "nesterov": _nesterov,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
    "adam": _adam,
}


def _square_root(x: Tensor) -> Tensor:
    """Rounded once, as NumPy's is on the CPU, where torch's own is off by a bit now and then."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def _times_lr(number: float, update: RowUpdate) -> float | Tensor:
    """In fp64; 0-d if it is a tensor, which leaves the dtype of what it meets as it is."""
    return number if update.lr is None else update.lr[0] * number


def _random_words(rows: Tensor, num_columns: int, stream: Stream) -> Tensor:
    """`stochastic_rounding.random_words` of rows [U] -> [U, num_columns], as int64 below 2**32."""
    # Not before: a lookup does not need it.
    from ...reference.rounding import KEY_STEPS, MULTIPLIERS, ROUNDS

    blocks = torch.arange(-(-num_columns // 4), device=rows.device)
    c0, c1, c2, c3 = (
        word.expand(len(rows), len(blocks))
        for word in (
            blocks[None, :],
            (rows & LOW)[:, None],
            (rows >> 32)[:, None],
            torch.full_like(rows, stream.step)[:, None],
        )
    )
    m0, m1 = (int(word) for word in MULTIPLIERS)
    k0, k1 = stream.seed & LOW, stream.seed >> 32
    for _ in range(ROUNDS):
        # The product's upper half is right, though the whole may look negative.
        product0, product1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & LOW) ^ c1 ^ k0,
            product1 & LOW,
            ((product0 >> 32) & LOW) ^ c3 ^ k1,
            product0 & LOW,
        )
        k0, k1 = (k0 + int(KEY_STEPS[0])) & LOW, (k1 + int(KEY_STEPS[1])) & LOW
    return torch.stack((c0, c1, c2, c3), -1).flatten(1)[:, :num_columns]


def _round_to_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    bits = values.view(torch.int32)
    rounded = (bits + (random >> 16).to(torch.int32)) & -0x10000
    return torch.where(values.isfinite(), rounded, bits).view(torch.float32)


def _round_to_float16(values: Tensor, random: Tensor) -> Tensor:
    magnitude = values.abs()
    bits = magnitude.view(torch.int32)
    floating = ((bits + (random >> 19).to(torch.int32)) & -0x2000).view(torch.float32)
    is_fixed = magnitude < 2.0**-14
    fixed = (torch.where(is_fixed, magnitude, 0) * 2.0**45).to(torch.int64)
    steps = (fixed + (random >> 11)) >> 21
    rounded = torch.where(is_fixed, steps.to(torch.float32) * 2.0**-24, floating)
    return torch.where(values.isfinite(), rounded.copysign(values), values)


ROUNDINGS = {torch.bfloat16: _round_to_bfloat16, torch.float16: _round_to_float16}
