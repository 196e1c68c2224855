"""Optimizer step on rows of many tables: the sums of table_segment_sum_kernel, ending in updates as in row_update.py.

Weight and state are buffers with the same layout. Row-wise Adagrad's state is one number per row of all tables.
Entry n's gradient is columns of table t in row b of values, where output_bag[n] = b * num_tables + t.
"""

import triton
import triton.language as tl

from .rounding import divide, square_root
from .row_update import add_mean, load_row, step_scalars, update_row
from .segment_walk import sum_runs
from .stochastic_rounding import random_words, round_at_random
from .table_columns import DIM, FIRST_ROW, row_begin, table_column


# grid:  as table_segment_sum_kernel
# tile:  as table_segment_sum_kernel; "rowwise_adagrad": BLOCK_D >= D, the mean needs the whole row
# owner: program (i, j): as table_segment_sum_kernel; of the rows, those whose runs end within its chunks
# why:   each row has one owner per step, so updates need no atomics
@triton.jit(do_not_specialize=["seed", "step"])
def table_row_update_kernel(
    values_ptr,  # grad_output, [num_bags, *], any strides
    order_ptr,  # [num_keys]: each key's entry before the sort
    keys_ptr,  # [num_keys], sorted row numbers; keys outside [0, num_rows) are skipped
    output_bag_ptr,  # [entries]: b * num_tables + t
    scales_ptr,  # [entries]; None: all 1
    max_positions_ptr,  # [num_bags, *], contiguous: the argmax as an entry; None: no table has mode "max"
    tables_ptr,  # int64 [num_tables, NUM_TABLE_COLUMNS]
    weight_ptr,  # the tables' buffer
    state_ptr,  # accumulation dtype, as the buffer, or [num_rows] for "rowwise_adagrad"; or None
    second_state_ptr,  # accumulation dtype, as the buffer, for "adam"; or None
    partial_ptr,  # accumulation dtype, [2 * num_chunks, D], by slot
    lr_ptr,  # fp64 [1], multiplies step_size and decay; None: 1
    num_keys,
    num_rows,
    num_tables,
    chunk_size,
    value_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    value_col_stride,  # in elements
    max_position_row_stride,  # total columns of all tables
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
    D: tl.constexpr,  # the widest table's
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
    sum_runs(
        values_ptr,
        order_ptr,
        keys_ptr,
        output_bag_ptr,
        scales_ptr,
        None,
        max_positions_ptr,
        tables_ptr,
        weight_ptr,
        partial_ptr,
        num_keys,
        num_rows,
        num_tables,
        chunk_size,
        value_row_stride,
        value_col_stride,
        max_position_row_stride,
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
            (weight_ptr, state_ptr, second_state_ptr),
            (scalars, seed, step),
            FORMULA,
            STOCHASTIC_ROUNDING,
            DECAYS_WEIGHT,
            (0, 1),
            True,
        ),
    )


# grid:  (num_runs,)
# tile:  BLOCK_D columns, two loops over D
# owner: program i: run i, whose summed gradient lies in memory
# why:   "rowwise_adagrad" on rows too long for registers: one pass for the mean square, one for the update
@triton.jit(do_not_specialize=["seed", "step"])
def table_rowwise_adagrad_kernel(
    total_ptr,  # accumulation dtype, [num_runs, D], contiguous
    keys_ptr,  # int64 [num_runs]: each run's row; keys outside [0, num_rows) are skipped
    tables_ptr,  # int64 [num_tables, NUM_TABLE_COLUMNS]
    weight_ptr,  # the tables' buffer
    state_ptr,  # accumulation dtype, [num_rows]
    lr_ptr,  # fp64 [1], multiplies step_size; None: 1
    num_rows,
    num_tables,
    search_steps,  # bits of num_tables
    step_size: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    grad_scale: tl.float64,
    seed: tl.int64,
    step: tl.int64,
    D: tl.constexpr,  # the widest table's
    STOCHASTIC_ROUNDING: tl.constexpr,
    DECAYS_WEIGHT: tl.constexpr,  # False: weight_decay is 0
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = total_ptr.dtype.element_ty
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    run = tl.program_id(0).to(tl.int64)
    key = tl.load(keys_ptr + run)
    if (key >= 0) & (key < num_rows):
        # Binary search: the last table with FIRST_ROW <= key; empty tables precede the one that has the row.
        table = run * 0
        end = table + num_tables
        for _ in range(search_steps):
            middle = (table + end) // 2
            begun = table_column(tables_ptr, middle, FIRST_ROW) <= key
            table = tl.where(begun, middle, table)
            end = tl.where(begun, end, middle)
        width = table_column(tables_ptr, table, DIM)
        begin = row_begin(tables_ptr, table, key, 1)
        scale = tl.full([1, 1], grad_scale, acc_dtype)
        shrink = tl.full([1, 1], weight_decay, acc_dtype)
        square = tl.zeros([1, 1], acc_dtype)
        for first in range(0, D, BLOCK_D):
            d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
            g = tl.load(total_ptr + run * D + d, mask=d < width, other=0) * scale
            if DECAYS_WEIGHT:
                row_ptr = weight_ptr + begin + d
                g = g + shrink * tl.load(row_ptr, mask=d < width, other=0).to(acc_dtype)
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
            row_ptr = weight_ptr + begin + d
            w = tl.load(row_ptr, mask=d < width, other=0).to(acc_dtype)
            if DECAYS_WEIGHT:
                g = g + shrink * w
            w = w - factor * g
            if STOCHASTIC_ROUNDING:
                w = round_at_random(w, random_words(seed, step, key, d), dtype)
            tl.store(row_ptr, w.to(dtype), mask=d < width)
        tl.store(state_ptr + key + tl.zeros([1, 1], tl.int64), state)
