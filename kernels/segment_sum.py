"""Sorted segment gradient: deterministic, each row of grad_weight written once, rounded once.

The sorted ids are cut into chunks of CHUNK. A run of equal ids that lies inside one chunk is summed in
registers and stored. A run that crosses a chunk's edge leaves partial sums: at most one at each end of a
chunk. The partial sums are again sorted by key, so the same kernel sums them, level by level, until one
chunk holds all that is left. The cut depends on the number of ids alone, so the order of the additions,
and with it every bit of the result, is the same from run to run.
"""

import triton
import triton.language as tl

from .rounding import divide


# Program (i, j) owns chunks [i * BLOCK_C, ...), one a row of its tile, and columns [j * BLOCK_D, ...).
# The rows of the tile walk their chunks side by side and never exchange anything.
@triton.jit
def segment_sum_kernel(
    values_ptr,  # [*, D], any strides: grad_output, or the partial sums of the level below
    order_ptr,  # int32 or int64 [num_keys]: the row of values that belongs to each key; None: its own place
    keys_ptr,  # [num_keys], sorted; keys outside [0, num_embeddings) take no part
    counts_ptr,  # int32 [num_keys]: ids behind each value; None: one
    bag_of_ptr,  # the row of values that belongs to what order holds, -1: none; None: that itself
    per_sample_weights_ptr,  # weight's dtype, one a position: multiplies the row; None: 1
    sizes_ptr,  # int32, one a row of values: divides it; None: 1. Not both
    grad_weight_ptr,  # [num_embeddings, D], contiguous, zero on entry
    # Accumulation dtype, [2 * num_chunks, D]: row 2c leads chunk c, 2c + 1 trails it. None: atomics add both to
    # grad_weight, which is of that dtype then; there are no partial keys and counts either.
    partial_values_ptr,
    partial_keys_ptr,  # int64 [2 * num_chunks]; -1: no such partial sum
    partial_counts_ptr,  # int32 [2 * num_chunks]
    num_keys,
    num_embeddings,
    value_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    value_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    SCALE_GRAD_BY_FREQ: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,  # loads in flight a thread; divides CHUNK
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOAD_ROW: tl.constexpr = None,  # None: a complete sum is stored; else what row_update_kernel does with it
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

    key_before = tl.load(keys_ptr + start - 1, mask=(start > 0) & (start <= num_keys), other=-1)
    key = tl.load(keys_ptr + start, mask=start < num_keys, other=-1).to(tl.int64)
    first_columns = (start < num_keys) & (tl.program_id(1) == 0)
    # True while the run at hand began in an earlier chunk.
    leading = (start > 0) & (key == key_before.to(tl.int64)) & (key >= 0) & (key < num_embeddings)
    lead_key = key

    total = tl.zeros([BLOCK_C, BLOCK_D], acc_dtype)
    count = tl.zeros([BLOCK_C], tl.int32)
    # Kept until the end: a store of another dtype in the loop would make Triton change layouts there.
    lead_total = tl.zeros([BLOCK_C, BLOCK_D], acc_dtype)
    lead_count = tl.zeros([BLOCK_C], tl.int32)
    leads = leading
    run_ends = leading
    longest = tl.minimum(num_keys - tl.program_id(0).to(tl.int64) * BLOCK_C * CHUNK, CHUNK)
    for step in range(0, longest, UNROLL):
        # All loads of a step are issued before the first sum needs one.
        keys = ()
        values = ()
        counts = ()
        rows = ()
        scales = ()
        for u in tl.static_range(UNROLL):
            position = start + step + u
            next_key = tl.load(keys_ptr + position + 1, mask=position + 1 < num_keys, other=-1).to(
                tl.int64
            )
            keys += (next_key,)
            here = key if u == 0 else keys[u - 1]
            taken = (position < num_keys) & (here >= 0) & (here < num_embeddings)
            source = position
            if order_ptr is not None:
                source = tl.load(order_ptr + position, mask=taken, other=0).to(tl.int64)
            if bag_of_ptr is not None:
                row = tl.load(bag_of_ptr + source, mask=taken, other=0).to(tl.int64)
                taken = taken & (row >= 0)
                if per_sample_weights_ptr is not None:
                    scale = tl.load(per_sample_weights_ptr + source, mask=taken, other=0)
                    scales += (scale.to(acc_dtype),)
                elif sizes_ptr is not None:
                    size = tl.load(sizes_ptr + row, mask=taken, other=1).to(acc_dtype)
                    scales += (divide(tl.full([BLOCK_C], 1, acc_dtype), size),)
                source = row
            value = tl.load(
                values_ptr + (source * value_row_stride * VEC)[:, None] + d * value_col_stride,
                mask=taken[:, None] & in_row,
                other=0,
            )  # [BLOCK_C, BLOCK_D]
            values += (value,)
            if LOAD_ROW is not None:
                ends = taken & (here != next_key) & ~(leads & (here == lead_key))
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
            stored = run_ends & ~leading & (key >= 0) & (key < num_embeddings)
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
            # An update costs more than a mask.
            elif tl.max(stored.to(tl.int32), 0) > 0:
                STORE_ROW(row_args, rows[u], key, row, stored, d, in_row)
            lead_ends = run_ends & leading
            lead_total = tl.where(lead_ends[:, None], total, lead_total)
            total = tl.where(run_ends[:, None], 0, total)
            if SCALE_GRAD_BY_FREQ:
                lead_count = tl.where(lead_ends, count, lead_count)
                count = tl.where(run_ends, 0, count)
            leading = leading & ~run_ends
            key = keys[u]

    # The run at hand goes on in the next chunk.
    trailing = (start + CHUNK < num_keys) & ~run_ends & (key >= 0) & (key < num_embeddings)
    # A run that fills the whole chunk is its leading sum; a trailing zero keeps its keys adjacent.
    fills = trailing & leading
    lead_total = tl.where(fills[:, None], total, lead_total)
    if partial_values_ptr is None:
        tl.atomic_add(
            grad_weight_ptr + (lead_key * D)[:, None] + d,
            lead_total,
            mask=leads[:, None] & in_row,
            sem="relaxed",
        )
        tl.atomic_add(
            grad_weight_ptr + (key * D)[:, None] + d,
            total,
            mask=(trailing & ~fills)[:, None] & in_row,
            sem="relaxed",
        )
    else:
        total = tl.where(fills[:, None], 0, total)
        lead_ptr = partial_values_ptr + (2 * chunk * D)[:, None] + d
        tl.store(lead_ptr, lead_total, mask=leads[:, None] & in_row)
        tl.store(lead_ptr + D, total, mask=trailing[:, None] & in_row)
        tl.store(partial_keys_ptr + 2 * chunk, tl.where(leads, lead_key, -1), mask=first_columns)
        tl.store(partial_keys_ptr + 2 * chunk + 1, tl.where(trailing, key, -1), mask=first_columns)
        if SCALE_GRAD_BY_FREQ:
            lead_count = tl.where(fills, count, lead_count)
            count = tl.where(fills, 0, count)
            tl.store(partial_counts_ptr + 2 * chunk, lead_count, mask=leads & first_columns)
            tl.store(partial_counts_ptr + 2 * chunk + 1, count, mask=trailing & first_columns)
