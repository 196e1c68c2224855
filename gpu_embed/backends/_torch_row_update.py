"""The formulas of `RowUpdate` in torch's operators, for the torch backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..bounds import in_table
from ..row_update import STATE, RowUpdate, Stream, arithmetic_dtype
from ..stochastic_rounding import KEY_STEPS, MULTIPLIERS, ROUNDS
from ..table_gradient import TableEntries
from ..tables import TableField

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
    kept = _kept(indices, weight.shape[0], rows)
    used, run = torch.unique(indices[kept], return_inverse=True)
    g = _summed(update, weight.dtype, values[kept], used, run)
    kept_state = [tensor[used] for tensor in state]
    weight[used] = _updated(update, weight[used], kept_state, g, used, weight.shape[1])
    for tensor, new in zip(state, kept_state, strict=True):
        tensor[used] = new


def table_row_update_(
    update: RowUpdate,
    weight: Tensor,
    state: tuple[Tensor, ...],
    entries: TableEntries,
    rows: Tensor | None,
) -> None:
    """`Backend.table_row_update_`; on CUDA it waits to learn how many rows there are.

    Rows are as wide as the widest here, with zeros behind each one's D.
    """
    kept = _kept(entries.rows, entries.num_rows, rows)
    used, run = torch.unique(entries.rows[kept], return_inverse=True)
    g = _summed(update, weight.dtype, entries.row_values()[kept], used, run)
    # Any entry of a row tells its table.
    entry = torch.empty_like(used)
    entry[run] = kept.nonzero()[:, 0]
    used_entries = entries._replace(rows=used, sources=entries.sources[entry])
    in_row = used_entries.in_row()
    elements = used_entries.elements(0)[in_row]

    def read(buffer: Tensor) -> Tensor:
        wide = buffer.new_zeros(in_row.shape)
        wide[in_row] = buffer.view(-1)[elements]
        return wide

    per_row = [layout.per_row for layout in STATE[update.formula]]
    kept_state = [
        tensor[used] if is_row else read(tensor)
        for tensor, is_row in zip(state, per_row, strict=True)
    ]
    dim = used_entries.field(TableField.DIM)
    weight.view(-1)[elements] = _updated(update, read(weight), kept_state, g, used, dim)[in_row]
    for tensor, new, is_row in zip(state, kept_state, per_row, strict=True):
        if is_row:
            tensor[used] = new
        else:
            tensor.view(-1)[elements] = new[in_row]


def _kept(indices: Tensor, num_rows: int, rows: Tensor | None) -> Tensor:
    """Which entries are of a row that may change -> bool [N]."""
    kept = in_table(indices, num_rows)
    return kept if rows is None else kept & rows[torch.where(kept, indices, 0)]


def _summed(
    update: RowUpdate, dtype: torch.dtype, values: Tensor, used: Tensor, run: Tensor
) -> Tensor:
    """What g is of each row in use [U, D], `run` being its number there of each of the values [N, D]."""
    dtype = arithmetic_dtype(dtype)
    g = torch.zeros(len(used), values.shape[1], dtype=dtype, device=values.device)
    return g.index_add_(0, run, values.to(dtype)).mul_(update.grad_scale)


def _updated(
    update: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, used: Tensor, dim: int | Tensor
) -> Tensor:
    """What becomes of rows w [U, D]; the state is changed in place. dim: D, or that of each row."""
    dtype = w.dtype
    w = FORMULAS[update.formula](update, w.to(g.dtype), state, g, dim)
    if update.stream is not None and update.rounds_at_random(dtype):
        w = ROUNDINGS[dtype](w, _random_words(used, w.shape[1], update.stream))
    return w.to(dtype)


# Each changes the state in place and returns w. An `alpha=` would fuse, and so round once less.


def _sgd(u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor) -> Tensor:
    return w - g * _times_lr(u.step_size, u)


def _adagrad(u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor) -> Tensor:
    total = state[0].add_(g * g)
    return w - g / (_square_root(total) + u.eps) * _times_lr(u.step_size, u)


def _rowwise_adagrad(
    u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor
) -> Tensor:
    total = state[0].add_((g * g).sum(1) / dim)
    step_size = torch.as_tensor(_times_lr(u.step_size, u), dtype=torch.float64).to(total)
    return w - (step_size / (_square_root(total) + u.eps))[:, None] * g


def _adam(u: RowUpdate, w: Tensor, state: list[Tensor], g: Tensor, dim: int | Tensor) -> Tensor:
    avg, sq = state
    avg.add_((g - avg) * u.avg_weight)
    sq.add_((g * g - sq) * u.sq_weight)
    w = w * (1 - _times_lr(u.decay, u))
    return w - avg / (_square_root(sq) + u.eps) * _times_lr(u.step_size, u)


Formula = Callable[[RowUpdate, Tensor, list[Tensor], Tensor, int | Tensor], Tensor]
FORMULAS: dict[str, Formula] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
    "adam": _adam,
}


def _square_root(x: Tensor) -> Tensor:
    """Rounded once: torch's own is off by a bit now and then on the CPU, and in fp64 remains so."""
    return x.double().sqrt().to(x.dtype)


def _times_lr(number: float, update: RowUpdate) -> float | Tensor:
    """In fp64; 0-d if it is a tensor, which leaves the dtype of what it meets as it is."""
    return number if update.lr is None else update.lr[0] * number


def _random_words(rows: Tensor, num_columns: int, stream: Stream) -> Tensor:
    """`stochastic_rounding.random_words` of rows [U] -> [U, num_columns], as int64 below 2**32."""
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
