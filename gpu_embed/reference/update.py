"""Optimizer steps on the rows that a batch names."""

from collections.abc import Callable, Sequence

import numpy as np

from ..row_update import RowUpdate
from .lookup import Array, in_table
from .rounding import random_words


def row_update(
    update: RowUpdate,
    weight: Array,
    state: Sequence[Array],
    indices: Array,
    values: Array,
    rows: Array | None = None,
    rounding: Callable[[Array, Array], Array] | None = None,
    first_row: int = 0,
) -> None:
    """One optimizer step on the rows of weight [V, D] that indices [N] name, in place; so is the state.

    Args:
        update: the formula and its numbers.
        state: what the formula keeps, each [V, D] or [V], in weight's dtype.
        values: the gradient [N, D] of each position; those of one row are summed first.
        rows: bool [V]: the rows that may change; None: all.
        rounding: how random bits round weight to the table's dtype; None: the caller rounds to nearest.
        first_row: what the number of row 0 is among the rows that share the stream of random bits.
    """
    kept = in_table(indices, len(weight))
    if rows is not None:
        kept &= rows[np.where(kept, indices, 0)]
    used, run = np.unique(indices[kept], return_inverse=True)
    total = np.zeros((len(used), weight.shape[1]), np.float64)
    np.add.at(total, run, values[kept].astype(np.float64))
    g = total.astype(weight.dtype) * weight.dtype.type(update.grad_scale)
    w = weight[used]
    if update.weight_decay:
        g = g + weight.dtype.type(update.weight_decay) * w
    old = [array[used] for array in state]
    lr = 1.0 if update.lr is None else float(update.lr)
    w, new = FORMULAS[update.formula](update, lr, w, old, g)
    if rounding is not None and update.stream is not None:
        w = rounding(w, random_words(used + first_row, w.shape[1], *update.stream))
    weight[used] = w
    for array, part in zip(state, new, strict=True):
        array[used] = part


Formula = Callable[[RowUpdate, float, Array, list[Array], Array], tuple[Array, list[Array]]]


def sgd(
    u: RowUpdate, lr: float, w: Array, state: list[Array], g: Array
) -> tuple[Array, list[Array]]:
    number = w.dtype.type
    return w - number(u.step_size * lr) * g, []


def momentum(
    u: RowUpdate, lr: float, w: Array, state: list[Array], g: Array
) -> tuple[Array, list[Array]]:
    number = w.dtype.type
    buffer = state[0] * number(u.momentum) + g * number(u.avg_weight)
    return w - number(u.step_size * lr) * buffer, [buffer]


def nesterov(
    u: RowUpdate, lr: float, w: Array, state: list[Array], g: Array
) -> tuple[Array, list[Array]]:
    number = w.dtype.type
    buffer = state[0] * number(u.momentum) + g * number(u.avg_weight)
    return w - number(u.step_size * lr) * (g + buffer * number(u.momentum)), [buffer]


def adagrad(
    u: RowUpdate, lr: float, w: Array, state: list[Array], g: Array
) -> tuple[Array, list[Array]]:
    number = w.dtype.type
    total = state[0] + g * g
    return w - number(u.step_size * lr) * (g / (np.sqrt(total) + number(u.eps))), [total]


def rowwise_adagrad(
    u: RowUpdate, lr: float, w: Array, state: list[Array], g: Array
) -> tuple[Array, list[Array]]:
    number = w.dtype.type
    total = state[0] + (g * g).sum(axis=1) / number(w.shape[1])
    return w - (number(u.step_size * lr) / (np.sqrt(total) + number(u.eps)))[:, None] * g, [total]


def adam(
    u: RowUpdate, lr: float, w: Array, state: list[Array], g: Array
) -> tuple[Array, list[Array]]:
    number = w.dtype.type
    avg, sq = state
    avg = avg + (g - avg) * number(u.avg_weight)
    sq = sq + (g * g - sq) * number(u.sq_weight)
    w = w * number(1 - u.decay * lr)
    return w - number(u.step_size * lr) * (avg / (np.sqrt(sq) + number(u.eps))), [avg, sq]


# By the names in RowUpdate.formula.
FORMULAS: dict[str, Formula] = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adagrad": adagrad,
    "rowwise_adagrad": rowwise_adagrad,
    "adam": adam,
}
