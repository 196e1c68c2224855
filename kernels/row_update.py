"""Optimizer step on the rows that have a gradient: a segment sum that ends in an update of the row.

As in segment_sum_kernel, each row's gradient is summed in registers. A run is complete in exactly one program per block
of columns, of the walk or of the join: that program reads, updates and writes the row and its state, so no gradient is
stored. The formulas are those of gpu_embed/row_update.py, operation by operation.
"""

import triton
import triton.language as tl

from .lanes import block_positions
from .rounding import divide, square_root
from .segment_walk import sum_runs
from .stochastic_rounding import random_words, round_at_random


# grid:  (cdiv(num_indices, BLOCK),)
# tile:  BLOCK ids
# owner: program i: positions [i * BLOCK, ...) of indices
# why:   one launch instead of a comparison, a gather and a selection
@triton.jit
def select_rows_kernel(
    indices_ptr,  # int64 [num_indices], contiguous
    rows_ptr,  # uint8 [num_embeddings]: 1: the row may change
    selected_ptr,  # int64 [num_indices]: the id; -1: its row must not change
    num_indices,
    num_embeddings,
    BLOCK: tl.constexpr,
):
    n = block_positions(BLOCK)  # [BLOCK]
    index = tl.load(indices_ptr + n, mask=n < num_indices, other=-1)
    in_table = (index >= 0) & (index < num_embeddings)
    chosen = tl.load(rows_ptr + index, mask=in_table, other=0)
    tl.store(selected_ptr + n, tl.where(chosen != 0, index, -1), mask=n < num_indices)


@triton.jit
def add_mean(state, square, width):
    """Row-wise Adagrad: state + square / width; square: the sum of a row's squares."""
    return state + divide(square, tl.broadcast_to(width, square.shape))


@triton.jit
def load_elements(row_args, pointers, mask, loaded):
    """Loads weight and state ahead of the step's sums, which hides their latency."""
    weight_ptr, state_ptr, second_state_ptr = pointers
    FORMULA: tl.constexpr = row_args[2]
    weight = tl.load(weight_ptr, mask=mask, other=0)
    state = weight
    second_state = weight
    if FORMULA == "rowwise_adagrad":
        state = tl.load(state_ptr, mask=loaded, other=0)
    elif FORMULA != "sgd":
        state = tl.load(state_ptr, mask=mask, other=0)
    if FORMULA == "adam":
        second_state = tl.load(second_state_ptr, mask=mask, other=0)
    return weight, state, second_state


@triton.jit
def update_elements(row_args, elements, pointers, key, width, total, mask, stored, d):
    """Update what `load_elements` read.

    Args:
        key: rows, [UNROLL, BLOCK_C, 1].
        width: of each row, as `key`.
        total: summed gradients, [UNROLL, BLOCK_C, BLOCK_D].
    """
    weight_ptr, state_ptr, second_state_ptr = pointers
    scalars, seed, step = row_args[1]
    step_size, keep, eps, avg_weight, sq_weight, momentum, weight_decay, grad_scale = scalars
    FORMULA: tl.constexpr = row_args[2]
    STOCHASTIC_ROUNDING: tl.constexpr = row_args[3]
    DECAYS_WEIGHT: tl.constexpr = row_args[4]
    weight, state, second_state = elements
    w = weight.to(total.dtype)
    g = total * grad_scale
    if DECAYS_WEIGHT:
        g = g + weight_decay * w
    if FORMULA == "sgd":
        w = w - step_size * g
    elif FORMULA == "momentum":
        state = state * momentum + g * avg_weight
        w = w - step_size * state
    elif FORMULA == "nesterov":
        state = state * momentum + g * avg_weight
        w = w - step_size * (g + state * momentum)
    elif FORMULA == "adagrad":
        state = state + g * g
        w = w - step_size * divide(g, square_root(state) + eps)
    elif FORMULA == "rowwise_adagrad":
        state = add_mean(state, tl.sum(g * g, 2, keep_dims=True), width)
        w = w - divide(step_size + tl.zeros_like(state), square_root(state) + eps) * g
    else:
        state = state + (g - state) * avg_weight
        second_state = second_state + (g * g - second_state) * sq_weight
        w = w * keep
        w = w - step_size * divide(state, square_root(second_state) + eps)

    if FORMULA == "rowwise_adagrad":
        tl.store(state_ptr, state, mask=stored)
    elif FORMULA != "sgd":
        tl.store(state_ptr, state, mask=mask)
    if FORMULA == "adam":
        tl.store(second_state_ptr, second_state, mask=mask)
    dtype = weight_ptr.dtype.element_ty
    if STOCHASTIC_ROUNDING:
        w = round_at_random(w, random_words(seed, step, key, d), dtype)
    tl.store(weight_ptr, w.to(dtype), mask=mask)


@triton.jit
def step_scalars(
    lr_ptr, step_size, decay, eps, avg_weight, sq_weight, momentum, weight_decay, grad_scale, dtype
):
    """The scalars of `update_elements`, [1, 1, 1], in the accumulation dtype."""
    lr = tl.full([1, 1, 1], 1, tl.float64)
    if lr_ptr is not None:
        lr *= tl.load(lr_ptr)
    return (
        (step_size * lr).to(dtype),
        (1 - decay * lr).to(dtype),
        tl.full([1, 1, 1], eps, dtype),
        tl.full([1, 1, 1], avg_weight, dtype),
        tl.full([1, 1, 1], sq_weight, dtype),
        tl.full([1, 1, 1], momentum, dtype),
        tl.full([1, 1, 1], weight_decay, dtype),
        tl.full([1, 1, 1], grad_scale, dtype),
    )


@triton.jit
def row_pointers(row_args, key, begin, d):
    """Pointers to weight and state of the rows `key`, [UNROLL, BLOCK_C, BLOCK_D] or per row.

    Args:
        begin: offset of each row in memory without gaps, as `key`.
    """
    weight_ptr, state_ptr, second_state_ptr = row_args[0]
    FORMULA: tl.constexpr = row_args[2]
    row_stride, col_stride = row_args[5]
    IS_BUFFER: tl.constexpr = row_args[6]
    weight_ptr = weight_ptr + (begin + d if IS_BUFFER else key * row_stride + d * col_stride)
    # Unused pointers alias the weight, as Triton <= 3.6 cannot return None; they are never dereferenced.
    if FORMULA == "sgd":
        state_ptr = weight_ptr
    elif FORMULA == "rowwise_adagrad":
        state_ptr = state_ptr + key
    else:
        state_ptr = state_ptr + begin + d
    if FORMULA == "adam":
        second_state_ptr = second_state_ptr + begin + d
    else:
        second_state_ptr = weight_ptr
    return weight_ptr, state_ptr, second_state_ptr


@triton.jit
def load_row(row_args, key, begin, mask, loaded, d):
    return load_elements(row_args, row_pointers(row_args, key, begin, d), mask, loaded)


@triton.jit
def update_row(row_args, elements, key, begin, width, total, mask, stored, d):
    # A masked row of tables may have width 0; no division by it.
    width = tl.maximum(width, 1).to(total.dtype)
    pointers = row_pointers(row_args, key, begin, d)
    update_elements(row_args, elements, pointers, key, width, total, mask, stored, d)


# grid:  as segment_sum_kernel
# tile:  as segment_sum_kernel; "rowwise_adagrad": BLOCK_D >= D, the mean needs the whole row
# owner: program (i, j): as segment_sum_kernel; of the rows, those whose runs end within its chunks
# why:   each row has one owner per step, so updates need no atomics
# An alignment beyond VEC elements would make Triton load the weight in wider vectors than the rest.
@triton.jit(do_not_specialize=["weight_row_stride", "seed", "step"])
def row_update_kernel(
    values_ptr,  # [*, D], any strides: the gradient
    order_ptr,  # [num_keys]: each key's position before the sort
    keys_ptr,  # [num_keys], sorted; keys outside [0, num_embeddings) are skipped
    weight_ptr,  # [num_embeddings, D], any strides
    state_ptr,  # accumulation dtype, [num_embeddings, D], or [num_embeddings] for "rowwise_adagrad"; or None
    second_state_ptr,  # accumulation dtype, [num_embeddings, D], for "adam"; or None
    partial_ptr,  # accumulation dtype, [2 * num_chunks, D], by slot
    lr_ptr,  # fp64 [1], multiplies step_size and decay; None: 1
    num_keys,
    num_embeddings,
    chunk_size,
    value_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    value_col_stride,  # in elements
    weight_row_stride,  # in units of VEC elements
    weight_col_stride,  # in elements
    step_size: tl.float64,  # Triton would round a float to fp32
    decay: tl.float64,
    eps: tl.float64,
    avg_weight: tl.float64,
    sq_weight: tl.float64,
    momentum: tl.float64,
    weight_decay: tl.float64,
    grad_scale: tl.float64,
    seed: tl.int64,
    step: tl.int64,
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    FORMULA: tl.constexpr,  # a key of gpu_embed.row_update.STATE
    STOCHASTIC_ROUNDING: tl.constexpr,
    DECAYS_WEIGHT: tl.constexpr,  # False: weight_decay is 0
    JOIN: tl.constexpr,
    UNROLL: tl.constexpr,  # rows in flight per thread
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    scalars = step_scalars(
        lr_ptr,
        step_size,
        decay,
        eps,
        avg_weight,
        sq_weight,
        momentum,
        weight_decay,
        grad_scale,
        acc_dtype,
    )
    tensors = (weight_ptr, state_ptr, second_state_ptr)
    strides = (weight_row_stride * VEC, weight_col_stride)
    sum_runs(
        values_ptr,
        order_ptr,
        keys_ptr,
        None,
        None,
        None,
        None,
        None,
        weight_ptr,
        partial_ptr,
        num_keys,
        num_embeddings,
        None,
        chunk_size,
        value_row_stride,
        value_col_stride,
        None,
        D=D,
        VEC=VEC,
        SCALE_GRAD_BY_FREQ=False,
        JOIN=JOIN,
        UNROLL=UNROLL,
        BLOCK_C=BLOCK_C,
        BLOCK_D=BLOCK_D,
        LOAD_ROW=load_row,
        STORE_ROW=update_row,
        row_args=(
            tensors,
            (scalars, seed, step),
            FORMULA,
            STOCHASTIC_ROUNDING,
            DECAYS_WEIGHT,
            strides,
            False,
        ),
    )


# grid:  (num_runs,)
# tile:  BLOCK_D columns, two loops over D
# owner: program i: run i, whose summed gradient lies in memory
# why:   "rowwise_adagrad" on rows too long for registers: one pass for the mean square, one for the update
@triton.jit(do_not_specialize=["seed", "step"])
def rowwise_adagrad_kernel(
    total_ptr,  # accumulation dtype, [num_runs, D], contiguous
    keys_ptr,  # int64 [num_runs]: each run's row; keys outside [0, num_embeddings) are skipped
    weight_ptr,  # [num_embeddings, D], any strides
    state_ptr,  # accumulation dtype, [num_embeddings]
    lr_ptr,  # fp64 [1], multiplies step_size; None: 1
    num_embeddings,
    weight_row_stride,  # in elements
    weight_col_stride,  # in elements
    step_size: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    grad_scale: tl.float64,
    seed: tl.int64,
    step: tl.int64,
    D: tl.constexpr,
    STOCHASTIC_ROUNDING: tl.constexpr,
    DECAYS_WEIGHT: tl.constexpr,  # False: weight_decay is 0
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = total_ptr.dtype.element_ty
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    run = tl.program_id(0).to(tl.int64)
    key = tl.load(keys_ptr + run)
    if (key >= 0) & (key < num_embeddings):
        scale = tl.full([1, 1], grad_scale, acc_dtype)
        shrink = tl.full([1, 1], weight_decay, acc_dtype)
        square = tl.zeros([1, 1], acc_dtype)
        for first in range(0, D, BLOCK_D):
            d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
            g = tl.load(total_ptr + run * D + d, mask=d < D, other=0) * scale
            if DECAYS_WEIGHT:
                row_ptr = weight_ptr + key * weight_row_stride + d * weight_col_stride
                g = g + shrink * tl.load(row_ptr, mask=d < D, other=0).to(acc_dtype)
            square += tl.sum(g * g, 1, keep_dims=True)
        width = tl.full([1, 1], D, acc_dtype)
        state = add_mean(tl.load(state_ptr + key) + tl.zeros([1, 1], acc_dtype), square, width)
        lr = tl.full([1, 1], 1, tl.float64)
        if lr_ptr is not None:
            lr *= tl.load(lr_ptr)
        root = square_root(state) + tl.full([1, 1], eps, acc_dtype)
        factor = divide((step_size * lr).to(acc_dtype), root)
        for first in range(0, D, BLOCK_D):
            d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
            g = tl.load(total_ptr + run * D + d, mask=d < D, other=0) * scale
            row_ptr = weight_ptr + key * weight_row_stride + d * weight_col_stride
            w = tl.load(row_ptr, mask=d < D, other=0).to(acc_dtype)
            if DECAYS_WEIGHT:
                g = g + shrink * w
            w = w - factor * g
            if STOCHASTIC_ROUNDING:
                w = round_at_random(w, random_words(seed, step, key, d), dtype)
            tl.store(row_ptr, w.to(dtype), mask=d < D)
        tl.store(state_ptr + key + tl.zeros([1, 1], tl.int64), state)
