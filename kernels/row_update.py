"""One optimizer step on the rows that have a gradient: a segment sum that ends in an update of the row.

The sorted walk of segment_sum_kernel sums each row's gradient in registers. Where a run is complete, and so in
one place for each row, the row and its state are read, updated and written, instead of a gradient.
The formulas are those of gpu_embed/row_update.py, operation by operation.
"""

import triton
import triton.language as tl

from .rounding import divide, square_root
from .segment_sum import segment_sum_kernel
from .stochastic_rounding import random_words, round_at_random


# Program i owns positions [i * BLOCK, ...) of indices.
@triton.jit
def select_rows_kernel(
    indices_ptr,  # int64 [num_indices], contiguous
    rows_ptr,  # uint8 [num_embeddings]: 1: the row may change, 0: it may not
    selected_ptr,  # int64 [num_indices]: the id, or -1 if its row may not change
    num_indices,
    num_embeddings,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    index = tl.load(indices_ptr + n, mask=n < num_indices, other=-1)
    in_table = (index >= 0) & (index < num_embeddings)
    chosen = tl.load(rows_ptr + index, mask=in_table, other=0)
    tl.store(selected_ptr + n, tl.where(chosen != 0, index, -1), mask=n < num_indices)


@triton.jit
def add_mean(state, square, width):
    """The state of row-wise Adagrad and the mean of a row's squares, of which their sum is given."""
    return state + divide(square, tl.broadcast_to(width, square.shape))


@triton.jit
def load_elements(row_args, places, mask, loaded):
    """Weight and state of parts of rows at these places, read before the sums of a step are known."""
    weight_place, state_place, second_state_place = places
    FORMULA: tl.constexpr = row_args[2]
    weight = tl.load(weight_place, mask=mask, other=0)
    state = weight
    second_state = weight
    if FORMULA == "rowwise_adagrad":
        state = tl.load(state_place, mask=loaded, other=0)[:, None]  # [BLOCK_C, 1]
    elif FORMULA != "sgd":
        state = tl.load(state_place, mask=mask, other=0)
    if FORMULA == "adam":
        second_state = tl.load(second_state_place, mask=mask, other=0)
    return weight, state, second_state


@triton.jit
def update_elements(row_args, row, places, key, width, total, mask, stored, d):
    """The update of what `load_elements` read, whose summed gradient is total [BLOCK_C, BLOCK_D].

    key [BLOCK_C]: the rows' numbers. width: how many columns they have.
    """
    weight_place, state_place, second_state_place = places
    numbers, seed, step = row_args[1]
    step_size, keep, eps, avg_weight, sq_weight, momentum, weight_decay, grad_scale = numbers
    FORMULA: tl.constexpr = row_args[2]
    STOCHASTIC_ROUNDING: tl.constexpr = row_args[3]
    DECAYS_WEIGHT: tl.constexpr = row_args[4]
    weight, state, second_state = row
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
        state = add_mean(state, tl.sum(g * g, 1, keep_dims=True), width)  # [BLOCK_C, 1]
        w = w - divide(step_size + tl.zeros_like(state), square_root(state) + eps) * g
    else:
        state = state + (g - state) * avg_weight
        second_state = second_state + (g * g - second_state) * sq_weight
        w = w * keep
        w = w - step_size * divide(state, square_root(second_state) + eps)

    if FORMULA == "rowwise_adagrad":
        tl.store(state_place, tl.sum(state, 1), mask=stored)
    elif FORMULA != "sgd":
        tl.store(state_place, state, mask=mask)
    if FORMULA == "adam":
        tl.store(second_state_place, second_state, mask=mask)
    dtype = weight_place.dtype.element_ty
    if STOCHASTIC_ROUNDING:
        w = round_at_random(w, random_words(seed, step, key[:, None], d), dtype)
    tl.store(weight_place, w.to(dtype), mask=mask)


@triton.jit
def step_numbers(
    lr_ptr,
    step_size,
    decay,
    eps,
    avg_weight,
    sq_weight,
    momentum,
    weight_decay,
    grad_scale,
    dtype,
):
    """What `update_elements` calculates with, in the dtype that it calculates in."""
    lr = tl.full([1, 1], 1, tl.float64)
    if lr_ptr is not None:
        lr *= tl.load(lr_ptr)
    return (
        (step_size * lr).to(dtype),
        (1 - decay * lr).to(dtype),
        tl.full([1, 1], eps, dtype),
        tl.full([1, 1], avg_weight, dtype),
        tl.full([1, 1], sq_weight, dtype),
        tl.full([1, 1], momentum, dtype),
        tl.full([1, 1], weight_decay, dtype),
        tl.full([1, 1], grad_scale, dtype),
    )


@triton.jit
def row_places(row_args, key, d):
    """Where weight and state of the rows of BLOCK_C keys of one table lie."""
    weight_place, state_place, second_state_place = row_args[0]
    FORMULA: tl.constexpr = row_args[2]
    row_stride, col_stride = row_args[5]
    D: tl.constexpr = row_args[6]
    weight_place = weight_place + (key * row_stride)[:, None] + d * col_stride
    # Up to Triton 3.6 no function returns None, so the state that a formula lacks is said to lie with the weight.
    if FORMULA == "sgd":
        state_place = weight_place
    elif FORMULA == "rowwise_adagrad":
        state_place = state_place + key
    else:
        state_place = state_place + (key * D)[:, None] + d
    if FORMULA == "adam":
        second_state_place = second_state_place + (key * D)[:, None] + d
    else:
        second_state_place = weight_place
    return weight_place, state_place, second_state_place


@triton.jit
def load_row(row_args, key, loaded, d, in_row):
    return load_elements(row_args, row_places(row_args, key, d), loaded[:, None] & in_row, loaded)


@triton.jit
def update_row(row_args, row, key, total, stored, d, in_row):
    D: tl.constexpr = row_args[6]
    width = tl.full([1, 1], D, total.dtype)
    mask = stored[:, None] & in_row
    places = row_places(row_args, key, d)
    update_elements(row_args, row, places, key, width, total, mask, stored, d)


# The grid, the walk and the levels are those of segment_sum_kernel. For "rowwise_adagrad" BLOCK_D holds a row.
@triton.jit(do_not_specialize=["seed", "step"])
def row_update_kernel(
    values_ptr,  # [*, D], any strides: the gradient, or the partial sums of the level below
    order_ptr,  # [num_keys]: the row of values that belongs to each key; None: the key's own position
    keys_ptr,  # [num_keys], sorted; keys outside [0, num_embeddings) take no part
    weight_ptr,  # [num_embeddings, D], any strides
    state_ptr,  # accumulation dtype, [num_embeddings, D], or [num_embeddings] for "rowwise_adagrad"; or None
    second_state_ptr,  # accumulation dtype, [num_embeddings, D], for "adam"; or None
    partial_values_ptr,  # accumulation dtype, [2 * num_chunks, D]: row 2c leads chunk c, 2c + 1 trails it
    partial_keys_ptr,  # int64 [2 * num_chunks]; -1: no such partial sum
    lr_ptr,  # fp64 [1]: multiplies step_size and decay; None: 1
    num_keys,
    num_embeddings,
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
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,  # loads in flight a thread; divides CHUNK
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    numbers = step_numbers(
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
    segment_sum_kernel(
        values_ptr,
        order_ptr,
        keys_ptr,
        None,
        None,
        None,
        None,
        weight_ptr,
        partial_values_ptr,
        partial_keys_ptr,
        None,
        num_keys,
        num_embeddings,
        value_row_stride,
        value_col_stride,
        D=D,
        VEC=VEC,
        SCALE_GRAD_BY_FREQ=False,
        CHUNK=CHUNK,
        UNROLL=UNROLL,
        BLOCK_C=BLOCK_C,
        BLOCK_D=BLOCK_D,
        LOAD_ROW=load_row,
        STORE_ROW=update_row,
        row_args=(
            tensors,
            (numbers, seed, step),
            FORMULA,
            STOCHASTIC_ROUNDING,
            DECAYS_WEIGHT,
            strides,
            D,
        ),
    )


# Program i owns run i. For rows that no program can hold: their summed gradients lie in memory.
@triton.jit(do_not_specialize=["seed", "step"])
def rowwise_adagrad_kernel(
    total_ptr,  # accumulation dtype, [num_runs, D], contiguous
    keys_ptr,  # int64 [num_runs]: the row of each run; none outside [0, num_embeddings)
    weight_ptr,  # [num_embeddings, D], any strides
    state_ptr,  # accumulation dtype, [num_embeddings]
    lr_ptr,  # fp64 [1]: multiplies step_size; None: 1
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
                place = weight_ptr + key * weight_row_stride + d * weight_col_stride
                g = g + shrink * tl.load(place, mask=d < D, other=0).to(acc_dtype)
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
            place = weight_ptr + key * weight_row_stride + d * weight_col_stride
            w = tl.load(place, mask=d < D, other=0).to(acc_dtype)
            if DECAYS_WEIGHT:
                g = g + shrink * w
            w = w - factor * g
            if STOCHASTIC_ROUNDING:
                w = round_at_random(w, random_words(seed, step, key, d), dtype)
            tl.store(place, w.to(dtype), mask=d < D)
        tl.store(state_ptr + key + tl.zeros([1, 1], tl.int64), state)
