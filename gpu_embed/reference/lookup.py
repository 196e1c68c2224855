"""What correct means: the operations in NumPy, for reading and for checking the kernels.

Arrays are float32 or float64 (16-bit tables are widened by the caller); sums are taken in float64 and
rounded once on return. Ids outside [0, num_embeddings) read as zeros and contribute nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..row_update import RowUpdate
from ..tables.layout import MODES, TableColumn
from .rounding import random_words

Array = NDArray  # any dtype; shapes stand in the docstrings


def embedding(weight: Array, indices: Array, zero_idx: int = -1) -> Array:
    """Rows of weight [V, D] at indices [...] -> [..., D]; rows of zero_idx and of bad ids are zero."""
    read = in_table(indices, len(weight)) & (indices != zero_idx)
    output = np.zeros((*indices.shape, weight.shape[1]), weight.dtype)
    output[read] = weight[indices[read]]
    return output


def embedding_dense_backward(
    grad_output: Array,
    indices: Array,
    num_embeddings: int,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
) -> Array:
    """Sum of grad_output [..., D] over the positions of each id -> grad_weight [num_embeddings, D].

    padding_idx gets no gradient; scale_grad_by_freq divides each row by the id's count in indices.
    """
    kept = in_table(indices, num_embeddings) & (indices != padding_idx)
    total = np.zeros((num_embeddings, grad_output.shape[-1]), np.float64)
    np.add.at(total, indices[kept], grad_output[kept].astype(np.float64))
    if scale_grad_by_freq:
        total /= np.maximum(embedding_counts(indices, num_embeddings), 1)[:, None]
    return total.astype(grad_output.dtype)


def embedding_counts(indices: Array, num_embeddings: int) -> Array:
    """How often each id occurs -> int32 [num_embeddings]."""
    kept = indices[in_table(indices, num_embeddings)].astype(np.int64)
    return np.bincount(kept, minlength=num_embeddings).astype(np.int32)


def embedding_renorm(weight: Array, indices: Array, max_norm: float, norm_type: float) -> Array:
    """weight [V, D] with every row of indices whose norm exceeds max_norm scaled down to it."""
    if not in_table(indices, len(weight)).all():
        return weight
    rows = np.unique(indices)
    norm = row_norm(weight[rows].astype(np.float64), norm_type)
    scale = np.where(norm > max_norm, max_norm / (norm + 1e-7), 1.0)
    renormed = weight.copy()
    renormed[rows] = (weight[rows] * scale[:, None]).astype(weight.dtype)
    return renormed


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


def row_norm(rows: Array, norm_type: float) -> Array:
    """The norm_type-norm of each row of [N, D] -> [N]; inf, -inf, 0 and negative powers as in torch."""
    magnitude = np.abs(rows)
    if norm_type == np.inf:
        return magnitude.max(axis=1, initial=0.0)
    if norm_type == -np.inf:
        return magnitude.min(axis=1, initial=np.inf)
    if norm_type == 0:
        return (magnitude != 0).sum(axis=1).astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        return (magnitude**norm_type).sum(axis=1) ** (1.0 / norm_type)


def in_table(indices: Array, num_embeddings: int) -> Array:
    """Which ids name a row."""
    return (indices >= 0) & (indices < num_embeddings)


def embedding_bag(
    weight: Array,
    indices: Array,
    offsets: Array,
    padding_idx: int = -1,
    mode: str = "sum",
    per_sample_weights: Array | None = None,
) -> Array:
    """Sum or mean of the rows of each bag of indices [N] -> [B, D].

    Bag b holds positions offsets[b] to offsets[b + 1] (offsets [B + 1]). padding_idx is left out, of the mean's
    divisor too; per_sample_weights [N] multiply the rows.
    """
    scale = position_scales(indices, len(weight), padding_idx, per_sample_weights)
    rows = embedding(weight, indices, padding_idx).astype(np.float64) * scale[:, None]
    output = np.stack([rows[begin:end].sum(axis=0) for begin, end in pairwise(offsets)])
    if mode == "mean":
        output /= bag_sizes(indices, offsets, padding_idx)[:, None]
    return output.astype(weight.dtype)


def position_scales(
    indices: Array, num_embeddings: int, padding_idx: int, per_sample_weights: Array | None
) -> Array:
    """What multiplies the row of each position -> float64 [N]; 0 where it takes no part."""
    read = in_table(indices, num_embeddings) & (indices != padding_idx)
    return np.where(read, 1.0 if per_sample_weights is None else per_sample_weights, 0.0)


def bag_sizes(indices: Array, offsets: Array, padding_idx: int) -> Array:
    """How many ids of each bag are not padding, at least 1 -> [B]."""
    # An id of -1 is out of range, and no padding where -1 stands for there being none.
    counted = (indices != padding_idx) | (indices < 0)
    return np.array([max(counted[begin:end].sum(), 1) for begin, end in pairwise(offsets)])


def embedding_bag_max(
    weight: Array, indices: Array, offsets: Array, padding_idx: int = -1
) -> tuple[Array, Array]:
    """Largest value in each column of each bag -> [B, D], and where in weight.ravel() it lies; -1: nowhere.

    The first of equals wins. NaN wins where it comes first in its bag, and nowhere else, as in torch.
    """
    output, position = largest_of_bags(weight, indices, offsets, padding_idx)
    embedding_dim = weight.shape[1]
    ids = np.append(indices, -1).astype(np.int64)[position]
    return output, np.where(position < 0, -1, ids * embedding_dim + np.arange(embedding_dim))


def largest_of_bags(
    weight: Array, indices: Array, offsets: Array, padding_idx: int = -1
) -> tuple[Array, Array]:
    """embedding_bag_max's output, and the position in indices of each row that it is of -> [B, D]; -1: none."""
    output = np.zeros((len(offsets) - 1, weight.shape[1]), weight.dtype)
    position = np.full(output.shape, -1)
    read = in_table(indices, len(weight)) & (indices != padding_idx)
    for bag, (begin, end) in enumerate(pairwise(offsets)):
        for n in begin + np.flatnonzero(read[begin:end]):
            row = weight[indices[n]]
            better = (row > output[bag]) | (position[bag] < 0)
            output[bag] = np.where(better, row, output[bag])
            position[bag] = np.where(better, n, position[bag])
    return output, position


def embedding_bag_dense_backward(
    grad_output: Array,
    indices: Array,
    offsets: Array,
    num_embeddings: int,
    padding_idx: int = -1,
    mode: str = "sum",
    per_sample_weights: Array | None = None,
    scale_grad_by_freq: bool = False,
) -> Array:
    """Gradient of embedding_bag's weight -> [num_embeddings, D]: each position hands its bag's on to its row."""
    wide = grad_output.astype(np.float64)
    if mode == "mean":
        wide /= bag_sizes(indices, offsets, padding_idx)[:, None]
    last = offsets[-1]
    scale = position_scales(indices, num_embeddings, padding_idx, per_sample_weights)
    grad_rows = wide[bag_of(offsets)] * scale[:last, None]
    grad_weight = embedding_dense_backward(
        grad_rows, indices[:last], num_embeddings, padding_idx, scale_grad_by_freq
    )
    return grad_weight.astype(grad_output.dtype)


def embedding_bag_sample_weights_backward(
    grad_output: Array, weight: Array, indices: Array, offsets: Array, padding_idx: int = -1
) -> Array:
    """Gradient of embedding_bag's per_sample_weights -> [N]: each position's row times its bag's gradient."""
    rows = embedding(weight, indices, padding_idx).astype(np.float64)
    grad = np.zeros(len(indices))
    last = offsets[-1]
    grad[:last] = (rows[:last] * grad_output[bag_of(offsets)]).sum(axis=1)
    return grad.astype(grad_output.dtype)


def bag_of(offsets: Array) -> Array:
    """The bag of each position that is in one -> [offsets[-1]]."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


# Many tables in one buffer. `tables` int [T, 8] holds the columns that `gpu_embed.tables.layout.TableColumn` names.


def table_batched_embedding(
    weight: Array,
    indices: Array,
    offsets: Array,
    tables: Array,
    pooled: bool,
    per_sample_weights: Array | None = None,
    zero_padding: bool = False,
    winner: Array | None = None,
) -> Array:
    """Bags of T tables, table-major (offsets [T * B + 1]) -> [B, sum D]; not pooled: rows of each id -> [N, D].

    Where they are not pooled, rows of padding_idx are read as stored unless zero_padding. Of a table of mode
    "max" the values at the positions winner [B, sum D].
    """
    num_bags = (len(offsets) - 1) // len(tables)
    parts = list(table_parts(weight, indices, offsets, tables))
    if pooled:
        output = np.zeros((num_bags, tables[:, TableColumn.DIM].sum()), weight.dtype)
        for part in parts:
            weights = None if per_sample_weights is None else per_sample_weights[part.positions]
            if part.mode == "max":
                assert winner is not None
                output[:, part.columns] = values_at(part.weight, indices, winner[:, part.columns])
                continue
            output[:, part.columns] = embedding_bag(
                part.weight, part.indices, part.offsets, part.padding_idx, part.mode, weights
            )
        return output
    output = np.zeros((len(indices), tables[0, TableColumn.DIM]), weight.dtype)
    for part in parts:
        zero_idx = part.padding_idx if zero_padding else -1
        output[part.positions] = embedding(part.weight, part.indices, zero_idx)
    return output


def table_batched_embedding_max(
    weight: Array, indices: Array, offsets: Array, tables: Array
) -> tuple[Array, Array]:
    """Bags as of table_batched_embedding, and for tables of mode "max" which position each maximum is; -1: none."""
    num_bags = (len(offsets) - 1) // len(tables)
    winner = np.full((num_bags, tables[:, TableColumn.DIM].sum()), -1)
    for part in table_parts(weight, indices, offsets, tables):
        if part.mode == "max":
            _, position = largest_of_bags(part.weight, part.indices, part.offsets, part.padding_idx)
            winner[:, part.columns] = np.where(position < 0, -1, position + part.positions.start)
    output = table_batched_embedding(weight, indices, offsets, tables, True, winner=winner)
    return output, winner


def values_at(weight: Array, indices: Array, positions: Array) -> Array:
    """From each column of weight [V, D] the elements in the rows of the ids at positions [B, D]; -1: zero."""
    ids = np.append(indices, 0).astype(np.int64)[positions]
    columns = np.arange(weight.shape[1])
    output = np.zeros(positions.shape, weight.dtype)
    there = positions >= 0
    output[there] = weight[ids, columns][there] if len(weight) else 0
    return output


def table_batched_embedding_dense_backward(
    grad_output: Array,
    indices: Array,
    offsets: Array,
    tables: Array,
    pooled: bool,
    weight_shape: tuple[int, ...],
    per_sample_weights: Array | None = None,
    winner: Array | None = None,
) -> Array:
    """Gradient of table_batched_embedding's buffer -> weight_shape."""
    grad_weight = np.zeros(weight_shape, grad_output.dtype)
    # Several features may look up in one table: their gradients add up.
    for part in table_parts(grad_weight, indices, offsets, tables):
        num_embeddings = len(part.weight)
        if part.mode == "max":
            assert winner is not None
            bag, column = np.nonzero(winner[:, part.columns] >= 0)
            rows = indices[winner[:, part.columns][bag, column]]
            total = np.zeros(part.weight.shape)
            np.add.at(total, (rows, column), grad_output[:, part.columns][bag, column])
            part.weight[:] += total
        elif pooled:
            weights = None if per_sample_weights is None else per_sample_weights[part.positions]
            part.weight[:] += embedding_bag_dense_backward(
                grad_output[:, part.columns],
                part.indices,
                part.offsets,
                num_embeddings,
                part.padding_idx,
                part.mode,
                weights,
            )
        else:
            part.weight[:] += embedding_dense_backward(
                grad_output[part.positions], part.indices, num_embeddings, part.padding_idx
            )
    return grad_weight


def table_batched_embedding_sample_weights_backward(
    grad_output: Array, weight: Array, indices: Array, offsets: Array, tables: Array
) -> Array:
    """Gradient of table_batched_embedding's per_sample_weights -> [N]."""
    grad = np.zeros(len(indices), grad_output.dtype)
    for part in table_parts(weight, indices, offsets, tables):
        grad[part.positions] = embedding_bag_sample_weights_backward(
            grad_output[:, part.columns],
            part.weight,
            part.indices,
            part.offsets,
            part.padding_idx,
        )
    return grad


class TablePart(NamedTuple):
    """One table's share of a batch."""

    weight: Array  # [V, D], in the buffer's memory
    indices: Array  # [n]
    offsets: Array  # [B + 1], from 0 on
    positions: slice  # of those ids among all
    columns: slice  # of the output
    padding_idx: int
    mode: str


def table_parts(
    weight: Array, indices: Array, offsets: Array, tables: Array
) -> Iterator[TablePart]:
    num_bags = (len(offsets) - 1) // len(tables)
    for number, table in enumerate(tables):
        rows, dim = table[TableColumn.NUM_ROWS], table[TableColumn.DIM]
        first_element, first_column = (
            table[TableColumn.FIRST_ELEMENT],
            table[TableColumn.FIRST_COLUMN],
        )
        ends = offsets[number * num_bags : (number + 1) * num_bags + 1]
        positions = slice(ends[0], ends[-1])
        yield TablePart(
            weight.reshape(-1)[first_element : first_element + rows * dim].reshape(rows, dim),
            indices[positions],
            ends - ends[0],
            positions,
            slice(first_column, first_column + dim),
            int(table[TableColumn.PADDING_IDX]),
            MODES[table[TableColumn.MODE]],
        )


# Lookups with Keras's rules: ids of any real dtype, cut to integers, negative ones counted from the end.


def take_rows(weight: Array, indices: Array) -> Array:
    """Rows of weight [V, D] at indices [...] -> [..., D]; rows of bad ids are zero."""
    return embedding(weight, wrapped_rows(indices, len(weight)))


def dequantize_rows(
    values: Array,
    scale: Array,
    zero: Array | None,
    indices: Array,
    embedding_dim: int,
    group_size: int,
    bits: int,
) -> Array:
    """Rows of a quantized table at indices [...] -> float64 [..., embedding_dim]; rows of bad ids are zero.

    Args:
        values: int8 [V, D], or [V, ceil(D / 2)] of 4 bits, the even column in the lower half of its byte.
        scale, zero: [V], or [V, ceil(D / group_size)]; without zeros a number is value / scale, and with them
            (value - zero) * scale.
    """
    rows = wrapped_rows(indices, len(values))
    read = in_table(rows, len(values))
    output = np.zeros((*indices.shape, embedding_dim))
    columns = values[rows[read]]
    if bits == 4:
        halves = np.stack([columns & 15, columns >> 4 & 15], axis=-1).reshape(len(columns), -1)
        columns = (halves[:, :embedding_dim] ^ 8) - 8
    group = np.arange(embedding_dim) // group_size
    per_column = scale.reshape(len(scale), -1)[rows[read]][:, group].astype(np.float64)
    if zero is None:
        output[read] = columns / per_column
    else:
        zeros = zero.reshape(len(zero), -1)[rows[read]][:, group]
        output[read] = (columns - zeros.astype(np.float64)) * per_column
    return output


def wrapped_rows(indices: Array, num_embeddings: int) -> Array:
    """The rows that ids mean -> int64 [...]; NaN and infinities mean -num_embeddings - 1, which is none."""
    nowhere = -num_embeddings - 1
    ids = np.where(np.abs(indices) < 2.0**63, indices, nowhere).astype(np.int64)
    return np.where(ids < 0, ids + num_embeddings, ids)
