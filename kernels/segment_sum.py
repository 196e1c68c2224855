"""Segment sum of sorted keys: a deterministic gradient; each row of grad_weight is written and rounded once.

As cub::DeviceReduce::ReduceByKey, in a fixed order; a level is a pass.
The sorted keys (ids) are cut into chunks of CHUNK. A run of equal keys within one chunk is summed in registers and
stored. A run that crosses a chunk's edge leaves partial sums: slot 2c holds the carry-in of chunk c, the sum of its
first run if that began earlier; slot 2c + 1 the carry-out, the sum of its last run if that goes on.

    keys     3   3   5   5 | 5   5   5   5 | 5   7   9   9     CHUNK 4
    stored   [ 3 ]                              [7]  [ 9 ]
    slots            [ 1 ]   [     2     ]  [4]                slot 3 holds 0

Equal keys of partial sums are adjacent again, so the same kernel sums them, level by level, until one chunk holds all;
level 0 reads grad_output. The cuts depend on the number of keys alone, so the order of the additions is deterministic.
"""

import triton
import triton.language as tl

from .rounding import divide
from .sort_keys import load_key


# grid:  (cdiv(num_chunks, BLOCK_C), cdiv(D, BLOCK_D))
# tile:  BLOCK_C chunks by BLOCK_D columns; num_warps 1
# owner: program (i, j): chunks [i * BLOCK_C, ...), one per row of its tile; columns [j * BLOCK_D, ...)
# why:   each tile row sums the runs of one chunk and shares nothing: no barrier, no shared memory
@triton.jit
def segment_sum_kernel(
    values_ptr,  # [*, D], any strides: grad_output, or the level below's partial sums
    order_ptr,  # int32 or int64 [num_keys]: each key's position before the sort; None: not permuted
    keys_ptr,  # [num_keys], sorted; keys outside [0, num_embeddings) are skipped
    counts_ptr,  # int32 [num_keys]: ids summed in each value; None: 1
    bag_of_ptr,  # [num_indices]: each position's bag, -1: in no bag; None: no bags, position n reads row n
    per_sample_weights_ptr,  # weight's dtype, [num_indices]; None: all 1
    sizes_ptr,  # int32 [num_bags]: the divisors of means; None: all 1. Not with per_sample_weights
    grad_weight_ptr,  # [num_embeddings, D], contiguous, zero on entry
    # Accumulation dtype, [2 * num_chunks, D], by slot. None, and so are the next two: atomics add the carries to
    # grad_weight, which then has the accumulation dtype.
    partial_values_ptr,
    partial_keys_ptr,  # int64 [2 * num_chunks]; -1: the slot is empty
    partial_counts_ptr,  # int32 [2 * num_chunks]
    num_keys,
    num_embeddings,
    value_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    value_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    SCALE_GRAD_BY_FREQ: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,  # loads in flight per thread; divides CHUNK
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOAD_ROW: tl.constexpr = None,  # None: a complete sum is stored; else row_update_kernel's callbacks update the row
    STORE_ROW: tl.constexpr = None,
    row_args=None,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if grad_weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    chunk = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    in_row = d < D
    start = chunk * CHUNK

    key_before = load_key(keys_ptr, start - 1, (start > 0) & (start <= num_keys))
    key = load_key(keys_ptr, start, start < num_keys)
    first_columns = (start < num_keys) & (tl.program_id(1) == 0)
    # True while the current run began in an earlier chunk.
    carried = (start > 0) & (key == key_before) & (key >= 0) & (key < num_embeddings)
    first_key = key

    total = tl.zeros([BLOCK_C, BLOCK_D], acc_dtype)
    count = tl.zeros([BLOCK_C], tl.int32)
    # Stored after the loop: a store of another dtype within it would make Triton convert layouts there.
    carry_in = tl.zeros([BLOCK_C, BLOCK_D], acc_dtype)
    carry_in_count = tl.zeros([BLOCK_C], tl.int32)
    carries_in = carried
    run_ends = carried
    longest = tl.minimum(num_keys - tl.program_id(0).to(tl.int64) * BLOCK_C * CHUNK, CHUNK)
    for step in range(0, longest, UNROLL):
        # All loads of a step are issued before the first addition.
        keys = ()
        values = ()
        counts = ()
        rows = ()
        scales = ()
        for u in tl.static_range(UNROLL):
            position = start + step + u
            next_key = load_key(keys_ptr, position + 1, position + 1 < num_keys)
            keys += (next_key,)
            here = key if u == 0 else keys[u - 1]
            taken = (position < num_keys) & (here >= 0) & (here < num_embeddings)
            n = position
            if order_ptr is not None:
                n = tl.load(order_ptr + position, mask=taken, other=0).to(tl.int64)
            value_row = n
            if bag_of_ptr is not None:
                value_row = tl.load(bag_of_ptr + n, mask=taken, other=0).to(tl.int64)
                taken = taken & (value_row >= 0)
                if per_sample_weights_ptr is not None:
                    scale = tl.load(per_sample_weights_ptr + n, mask=taken, other=0)
                    scales += (scale.to(acc_dtype),)
                elif sizes_ptr is not None:
                    size = tl.load(sizes_ptr + value_row, mask=taken, other=1).to(acc_dtype)
                    scales += (divide(tl.full([BLOCK_C], 1, acc_dtype), size),)
            value = tl.load(
                values_ptr + (value_row * value_row_stride * VEC)[:, None] + d * value_col_stride,
                mask=taken[:, None] & in_row,
                other=0,
            )  # [BLOCK_C, BLOCK_D]
            values += (value,)
            if LOAD_ROW is not None:
                ends = taken & (here != next_key) & ~(carries_in & (here == first_key))
                rows += (LOAD_ROW(row_args, here, ends, d, in_row),)
            if SCALE_GRAD_BY_FREQ:
                if counts_ptr is None:
                    counts += (taken.to(tl.int32),)
                else:
                    counts += (tl.load(counts_ptr + position, mask=taken, other=0),)
        for u in tl.static_range(UNROLL):
            position = start + step + u
            value = values[u].to(acc_dtype)
            if per_sample_weights_ptr is not None or sizes_ptr is not None:
                value *= scales[u][:, None]
            total += value
            if SCALE_GRAD_BY_FREQ:
                count += counts[u]
            run_ends = (position < num_keys) & (key != keys[u])
            stored = run_ends & ~carried & (key >= 0) & (key < num_embeddings)
            row = total
            if SCALE_GRAD_BY_FREQ:
                divisor = tl.maximum(count, 1).to(acc_dtype)[:, None]
                row = divide(total, tl.broadcast_to(divisor, [BLOCK_C, BLOCK_D]))
            if STORE_ROW is None:
                tl.store(
                    grad_weight_ptr + (key * D)[:, None] + d,
                    row.to(grad_weight_ptr.dtype.element_ty),
                    mask=stored[:, None] & in_row,
                )
            # An update is skipped, not masked: it costs more than the branch.
            elif tl.max(stored.to(tl.int32), 0) > 0:
                STORE_ROW(row_args, rows[u], key, row, stored, d, in_row)
            carry_in_ends = run_ends & carried
            carry_in = tl.where(carry_in_ends[:, None], total, carry_in)
            total = tl.where(run_ends[:, None], 0, total)
            if SCALE_GRAD_BY_FREQ:
                carry_in_count = tl.where(carry_in_ends, count, carry_in_count)
                count = tl.where(run_ends, 0, count)
            carried = carried & ~run_ends
            key = keys[u]

    # The last run goes on in the next chunk.
    carries_out = (start + CHUNK < num_keys) & ~run_ends & (key >= 0) & (key < num_embeddings)
    # A run that fills the chunk is its carry-in. Its carry-out is 0, so that the run's partial keys stay adjacent.
    fills = carries_out & carried
    carry_in = tl.where(fills[:, None], total, carry_in)
    if partial_values_ptr is None:
        tl.atomic_add(
            grad_weight_ptr + (first_key * D)[:, None] + d,
            carry_in,
            mask=carries_in[:, None] & in_row,
            sem="relaxed",
        )
        tl.atomic_add(
            grad_weight_ptr + (key * D)[:, None] + d,
            total,
            mask=(carries_out & ~fills)[:, None] & in_row,
            sem="relaxed",
        )
    else:
        total = tl.where(fills[:, None], 0, total)
        carry_in_ptr = partial_values_ptr + (2 * chunk * D)[:, None] + d
        tl.store(carry_in_ptr, carry_in, mask=carries_in[:, None] & in_row)
        tl.store(carry_in_ptr + D, total, mask=carries_out[:, None] & in_row)
        tl.store(
            partial_keys_ptr + 2 * chunk, tl.where(carries_in, first_key, -1), mask=first_columns
        )
        tl.store(
            partial_keys_ptr + 2 * chunk + 1, tl.where(carries_out, key, -1), mask=first_columns
        )
        if SCALE_GRAD_BY_FREQ:
            carry_in_count = tl.where(fills, count, carry_in_count)
            count = tl.where(fills, 0, count)
            tl.store(
                partial_counts_ptr + 2 * chunk, carry_in_count, mask=carries_in & first_columns
            )
            tl.store(partial_counts_ptr + 2 * chunk + 1, count, mask=carries_out & first_columns)
