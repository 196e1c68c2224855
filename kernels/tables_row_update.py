"""One optimizer step on rows of many tables of different widths: a walk over all of them that ends in updates.

What table_segment_sum_kernel is to segment_sum_kernel, this is to row_update_kernel. Weight and state are buffers
in which the tables lie alike; the state of row-wise Adagrad is one number a row, of all tables' rows.
"""

import triton
import triton.language as tl

from .rounding import divide, square_root
from .row_update import add_mean, load_elements, step_numbers, update_elements
from .stochastic_rounding import random_words, round_at_random
from .tables import DIM, FIRST_ROW, load_field, row_begin, table_segment_sum_kernel


@triton.jit
def row_places(row_args, key, begin, d):
    """Where weight and state of the rows of BLOCK_C keys lie, each in its table."""
    weight_place, state_place, second_state_place = row_args[0]
    FORMULA: tl.constexpr = row_args[2]
    weight_place = weight_place + begin[:, None] + d
    # As in row_update's: no None is returned.
    if FORMULA == "sgd":
        state_place = weight_place
    elif FORMULA == "rowwise_adagrad":
        state_place = state_place + key
    else:
        state_place = state_place + begin[:, None] + d
    if FORMULA == "adam":
        second_state_place = second_state_place + begin[:, None] + d
    else:
        second_state_place = weight_place
    return weight_place, state_place, second_state_place


@triton.jit
def load_table_row(row_args, key, begin, mask, loaded, d):
    return load_elements(row_args, row_places(row_args, key, begin, d), mask, loaded)


@triton.jit
def update_table_row(row_args, row, key, begin, width, total, mask, stored, d):
    # What is not stored may be no row of any table.
    width = tl.maximum(width, 1).to(total.dtype)[:, None]
    places = row_places(row_args, key, begin, d)
    update_elements(row_args, row, places, key, width, total, mask, stored, d)


# The grid, the walk and the levels are those of table_segment_sum_kernel. For "rowwise_adagrad" BLOCK_D holds a row.
@triton.jit(do_not_specialize=["seed", "step"])
def table_row_update_kernel(
    values_ptr,  # [num_bags, *], any strides: grad_output; or [num_keys, D]: partial sums of the level below
    order_ptr,  # [num_keys]: the entry that belongs to each key; None: a level of partial sums
    keys_ptr,  # [num_keys], sorted row numbers; those outside [0, num_rows) take no part
    key_tables_ptr,  # int32 [num_keys]: each partial sum's table; None: that of its entry
    sources_ptr,  # [entries]: bag b of table t is b * num_tables + t; None: a level of partial sums
    scales_ptr,  # one an entry: multiplies its gradient; None: 1
    winner_ptr,  # [num_bags, *], contiguous: the entry that is the maximum; None: no table has mode "max"
    tables_ptr,  # int64 [num_tables, NUM_FIELDS]
    weight_ptr,  # the tables' buffer
    state_ptr,  # accumulation dtype, as the buffer, or [num_rows] for "rowwise_adagrad"; or None
    second_state_ptr,  # accumulation dtype, as the buffer, for "adam"; or None
    partial_values_ptr,  # accumulation dtype, [2 * num_chunks, D]: row 2c leads chunk c, 2c + 1 trails it
    partial_keys_ptr,  # int64 [2 * num_chunks]; -1: no such partial sum
    partial_tables_ptr,  # int32 [2 * num_chunks]
    lr_ptr,  # fp64 [1]: multiplies step_size and decay; None: 1
    num_keys,
    num_rows,
    num_tables,
    value_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    value_col_stride,  # in elements
    winner_row_stride,  # columns of all tables
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
    D: tl.constexpr,  # of the widest table
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
    table_segment_sum_kernel(
        values_ptr,
        order_ptr,
        keys_ptr,
        key_tables_ptr,
        sources_ptr,
        scales_ptr,
        None,
        winner_ptr,
        tables_ptr,
        weight_ptr,
        partial_values_ptr,
        partial_keys_ptr,
        partial_tables_ptr,
        num_keys,
        num_rows,
        num_tables,
        value_row_stride,
        value_col_stride,
        winner_row_stride,
        D=D,
        VEC=VEC,
        CHUNK=CHUNK,
        UNROLL=UNROLL,
        BLOCK_C=BLOCK_C,
        BLOCK_D=BLOCK_D,
        LOAD_ROW=load_table_row,
        STORE_ROW=update_table_row,
        row_args=(
            (weight_ptr, state_ptr, second_state_ptr),
            (numbers, seed, step),
            FORMULA,
            STOCHASTIC_ROUNDING,
            DECAYS_WEIGHT,
        ),
    )


# Program i owns run i. For rows that no program can hold: their summed gradients lie in memory.
@triton.jit(do_not_specialize=["seed", "step"])
def table_rowwise_adagrad_kernel(
    total_ptr,  # accumulation dtype, [num_runs, D], contiguous
    keys_ptr,  # int64 [num_runs]: the row of each run; none outside [0, num_rows)
    tables_ptr,  # int64 [num_tables, NUM_FIELDS]
    weight_ptr,  # the tables' buffer
    state_ptr,  # accumulation dtype, [num_rows]
    lr_ptr,  # fp64 [1]: multiplies step_size; None: 1
    num_rows,
    num_tables,
    search_steps,  # bits of num_tables
    step_size: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    grad_scale: tl.float64,
    seed: tl.int64,
    step: tl.int64,
    D: tl.constexpr,  # of the widest table
    STOCHASTIC_ROUNDING: tl.constexpr,
    DECAYS_WEIGHT: tl.constexpr,  # False: weight_decay is 0
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = total_ptr.dtype.element_ty
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    run = tl.program_id(0).to(tl.int64)
    key = tl.load(keys_ptr + run)
    if (key >= 0) & (key < num_rows):
        # The last table that begins at the row or before it; tables without rows come before the one that has it.
        table = run * 0
        end = table + num_tables
        for _ in range(search_steps):
            middle = (table + end) // 2
            begun = load_field(tables_ptr, middle, FIRST_ROW) <= key
            table = tl.where(begun, middle, table)
            end = tl.where(begun, end, middle)
        width = load_field(tables_ptr, table, DIM)
        begin = row_begin(tables_ptr, table, key, 1)
        scale = tl.full([1, 1], grad_scale, acc_dtype)
        shrink = tl.full([1, 1], weight_decay, acc_dtype)
        square = tl.zeros([1, 1], acc_dtype)
        for first in range(0, D, BLOCK_D):
            d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
            g = tl.load(total_ptr + run * D + d, mask=d < width, other=0) * scale
            if DECAYS_WEIGHT:
                place = weight_ptr + begin + d
                g = g + shrink * tl.load(place, mask=d < width, other=0).to(acc_dtype)
            square += tl.sum(g * g, 1, keep_dims=True)
        divisor = width.to(acc_dtype) + tl.zeros([1, 1], acc_dtype)
        state = add_mean(tl.load(state_ptr + key) + tl.zeros([1, 1], acc_dtype), square, divisor)
        lr = tl.full([1, 1], 1, tl.float64)
        if lr_ptr is not None:
            lr *= tl.load(lr_ptr)
        root = square_root(state) + tl.full([1, 1], eps, acc_dtype)
        factor = divide((step_size * lr).to(acc_dtype), root)
        for first in range(0, D, BLOCK_D):
            d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
            g = tl.load(total_ptr + run * D + d, mask=d < width, other=0) * scale
            place = weight_ptr + begin + d
            w = tl.load(place, mask=d < width, other=0).to(acc_dtype)
            if DECAYS_WEIGHT:
                g = g + shrink * w
            w = w - factor * g
            if STOCHASTIC_ROUNDING:
                w = round_at_random(w, random_words(seed, step, key, d), dtype)
            tl.store(place, w.to(dtype), mask=d < width)
        tl.store(state_ptr + key + tl.zeros([1, 1], tl.int64), state)
