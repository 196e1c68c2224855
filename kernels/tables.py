"""Many tables, one launch: bags, rows and gradients of tables of different widths that share one buffer.

tables_ptr, int64 [num_tables, NUM_TABLE_COLUMNS], has one row per table, half a cache line. Bags are table-major: bag b
of table t begins at offsets[t * num_bags + b], clamped as in bag.py. Output bag b * num_tables + t is the columns of
table t in row b of the output. Row numbers (keys) count through all tables.
"""

import triton
import triton.language as tl

from .bag import clamp_range, is_padding, load_range, record_offsets
from .bounds import record_bag_out_of_range
from .flat_chunk import chunk_start, window_rows
from .gather import copy_rows
from .lanes import block_positions
from .rounding import divide
from .segment_walk import add_sum, load_sum, sum_runs
from .sort_keys import store_key
from .table_columns import (
    DIM,
    FIRST_COLUMN,
    FIRST_ELEMENT,
    FIRST_ROW,
    MAX_MODE,
    MEAN_MODE,
    MODE,
    NAME,
    NUM_ROWS,
    PADDING_IDX,
    load_multiple,
    row_begin,
    table_column,
)


@triton.jit
def find_range(offsets_ptr, n, num_ranges, range_bags, search_steps):
    """Binary search: the last range of range_bags bags that begins at or before each position n."""
    low = n * 0
    high = low + num_ranges
    for _ in range(search_steps):
        middle = (low + high) // 2
        begun = (middle == 0) | (tl.load(offsets_ptr + middle * range_bags).to(tl.int64) <= n)
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def contributes(tables_ptr, table, argmax, n):
    """Whether position n contributes to each column: sum and mean always; max only if n is the argmax."""
    is_max = table_column(tables_ptr, table, MODE) == MAX_MODE
    return ~is_max[:, None] | (argmax.to(tl.int64) == n[:, None])


# grid:  (cdiv(num_bags * D / VEC, BLOCK), num_splits)
# tile:  BLOCK vectors of VEC columns, one per lane
# owner: program (i, s): vectors [i * BLOCK, ...) of the flattened output, split s of num_splits of each one's bag
# why:   no lane idles, whatever the tables' widths; adjacent threads read adjacent columns of the same rows: coalesced
@triton.jit
def table_bag_kernel(
    weight_ptr,  # the tables' buffer
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_tables * num_bags + 1]
    per_sample_weights_ptr,  # weight's dtype, [num_indices], contiguous; None: all 1
    tables_ptr,  # int64 [num_tables, NUM_TABLE_COLUMNS]
    table_of_column_ptr,  # int32 [D]
    output_ptr,  # [num_bags, D], any floating dtype; SPLIT: partial sums, accumulation dtype, [num_splits, num_bags, D]
    sizes_ptr,  # SPLIT and MEAN: int64 [num_splits, num_bags, D]: each split's share of the divisor; else None
    # int32 or int64 [num_bags, D]: the argmax as a position, -1: none. MAX: an output; None: not wanted. Else an input,
    # the argmax of an earlier launch; None: no table has mode "max". Never both, so one argument serves.
    max_positions_ptr,
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_bags,  # per table
    num_all_bags,
    D: tl.constexpr,  # total of all tables
    VEC: tl.constexpr,  # elements a thread loads with one instruction; divides every table's D
    MEAN: tl.constexpr,  # some table has mode "mean"
    MAX: tl.constexpr,  # some table has mode "max", and its argmax is to be found; not with SPLIT
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,  # rows in flight per thread
    BLOCK: tl.constexpr,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    VECTORS: tl.constexpr = D // VEC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_b = start // VECTORS
    flat_offset = (start - first_b * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    b = first_b + flat_offset // VECTORS
    column = flat_offset % VECTORS * VEC
    in_range = b < num_bags
    table = tl.load(table_of_column_ptr + column, mask=in_range, other=0).to(tl.int64)
    bag = table * num_bags + b
    offset, next_offset = load_range(offsets_ptr, bag, in_range, num_indices, num_all_bags + 1, 0)
    begin, end = clamp_range(offset, next_offset, bag, in_range, num_indices)
    first = begin
    last = end
    if SPLIT:
        length = (end - begin + tl.num_programs(1) - 1) // tl.num_programs(1)
        first = tl.minimum(begin + tl.program_id(1) * length, end)
        last = tl.minimum(first + length, end)

    num_rows = table_column(tables_ptr, table, NUM_ROWS)
    padding_idx = table_column(tables_ptr, table, PADDING_IDX)
    row_stride = load_multiple(tables_ptr, table, DIM, VEC)
    column_in_table = column - load_multiple(tables_ptr, table, FIRST_COLUMN, VEC)
    base = load_multiple(tables_ptr, table, FIRST_ELEMENT, VEC) + column_in_table
    d = tl.arange(0, VEC)[None, :]  # [1, VEC]
    out = ((start + tl.arange(0, BLOCK)) * VEC)[:, None] + d

    total = tl.zeros([BLOCK, VEC], acc_dtype)
    size = tl.zeros([BLOCK], tl.int64)
    if MAX:
        is_max = table_column(tables_ptr, table, MODE) == MAX_MODE
        argmax = tl.full([BLOCK, VEC], -1, tl.int64)
        empty = in_range
    elif max_positions_ptr is not None:
        argmax = tl.load(max_positions_ptr + out, mask=in_range[:, None], other=-1)
    bad_n = tl.full([BLOCK], -1, tl.int64)
    bad_index = tl.zeros([BLOCK], tl.int64)
    for step in range(0, tl.max(last - first, 0), UNROLL):
        # All loads of a step are issued before the first addition.
        indices = ()
        values = ()
        scales = ()
        for u in tl.static_range(UNROLL):
            n = first + step + u
            index = tl.load(indices_ptr + n, mask=n < last, other=0).to(tl.int64)
            indices += (index,)
        for u in tl.static_range(UNROLL):
            n = first + step + u
            index = indices[u]
            in_table = (index >= 0) & (index < num_rows)
            taken = (n < last) & ~is_padding(index, padding_idx)
            value = tl.load(
                weight_ptr + (base + index * row_stride)[:, None] + d,
                mask=(taken & in_table)[:, None],
                other=0,
            )  # [BLOCK, VEC]
            values += (value,)
            if per_sample_weights_ptr is not None:
                scale = tl.load(per_sample_weights_ptr + n, mask=taken & in_table, other=0)
                scales += (scale.to(acc_dtype),)
            if MEAN:
                size += taken.to(tl.int64)
            if record_ptr is not None:
                bad = taken & ~in_table & (bad_n < 0)
                bad_n = tl.where(bad, n, bad_n)
                bad_index = tl.where(bad, index, bad_index)
        for u in tl.static_range(UNROLL):
            value = values[u].to(acc_dtype)
            if per_sample_weights_ptr is not None:
                value *= scales[u][:, None]
            if MAX:
                n = first + step + u
                index = indices[u]
                kept = (n < last) & ~is_padding(index, padding_idx)
                kept = kept & (index >= 0) & (index < num_rows)
                # `>`, not `>=`: the first of equals stays, as does a NaN in the bag's first row.
                better = (kept & is_max)[:, None] & (empty[:, None] | (value > total))
                argmax = tl.where(better, n[:, None], argmax)
                total = tl.where(is_max[:, None], tl.where(better, value, total), total + value)
                empty = empty & ~kept
            elif max_positions_ptr is not None:
                total += tl.where(
                    contributes(tables_ptr, table, argmax, first + step + u), value, 0
                )
            else:
                total += value

    if MEAN:
        is_mean = table_column(tables_ptr, table, MODE) == MEAN_MODE
        size = tl.where(is_mean, size, tl.where(tl.program_id(1) == 0, 1, 0))
    if SPLIT:
        out += tl.program_id(1) * num_bags * D
        if sizes_ptr is not None:
            size = tl.broadcast_to(size[:, None], [BLOCK, VEC])
            tl.store(sizes_ptr + out, size, mask=in_range[:, None])
    elif MEAN:
        divisor = tl.maximum(size, 1).to(acc_dtype)[:, None]
        total = divide(total, tl.broadcast_to(divisor, [BLOCK, VEC]))
    tl.store(output_ptr + out, total.to(output_ptr.dtype.element_ty), mask=in_range[:, None])
    if MAX and max_positions_ptr is not None:
        tl.store(
            max_positions_ptr + out,
            argmax.to(max_positions_ptr.dtype.element_ty),
            mask=in_range[:, None],
        )
    if record_ptr is not None:
        reports = in_range & (column_in_table == 0)
        record_bag_out_of_range(
            record_ptr,
            flag_ptr,
            reports & (bad_n >= 0),
            bad_n,
            bad_index,
            num_rows,
            b + 1,
            begin,
            table_column(tables_ptr, table, NAME),
        )
        record_offsets(
            record_ptr, flag_ptr, bag, reports, begin, end, offset, next_offset, num_indices
        )


# grid:  (cdiv(num_bags * D, BLOCK),)
# tile:  BLOCK_S splits by BLOCK elements, a loop over the splits
# owner: program i: elements [i * BLOCK, ...) of the flattened output
# why:   adds the partial sums of table_bag_kernel's splits in a fixed order: no atomics, deterministic
@triton.jit
def table_combine_kernel(
    partial_ptr,  # accumulation dtype, [num_splits, num_bags, D]
    sizes_ptr,  # mean: int64 [num_splits, num_bags]: each split's share of the divisor; sum: None
    output_ptr,  # [num_bags, D]
    num_splits,
    num_bags,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_elements = num_bags * D
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_range = (element < num_elements)[None, :]
    total = tl.zeros([BLOCK_S, BLOCK], partial_ptr.dtype.element_ty)
    size = tl.zeros([BLOCK_S, BLOCK], tl.int64)
    for first in range(0, num_splits, BLOCK_S):
        split = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        taken = (split < num_splits) & in_range
        total += tl.load(partial_ptr + split * num_elements + element[None, :], mask=taken, other=0)
        if sizes_ptr is not None:
            bag = (element // D)[None, :]
            size += tl.load(sizes_ptr + split * num_bags + bag, mask=taken, other=0)
    output = tl.sum(total, 0)
    if sizes_ptr is not None:
        output = divide(output, tl.maximum(tl.sum(size, 0), 1).to(output.dtype))
    tl.store(
        output_ptr + element, output.to(output_ptr.dtype.element_ty), mask=element < num_elements
    )


# grid:  (cdiv(num_indices * D / VEC, BLOCK),)
# tile:  32 vectors of VEC elements, BLOCK / 32 times; one warp
# owner: program i: vectors [i * BLOCK, ...) of the flattened output, across row boundaries; an equal share of the
#        offsets to check
# why:   as gather_flat_kernel, and one lane searches for a position's table; no program owns a bag, so the offsets are
#        shared out
@triton.jit
def table_gather_kernel(
    weight_ptr,  # [rows of all tables, D], contiguous
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_all_bags + 1]
    tables_ptr,  # int64 [num_tables, NUM_TABLE_COLUMNS]
    output_ptr,  # [num_indices, D]
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_bags,  # per table
    num_all_bags,
    num_tables,
    search_steps,  # bits of num_tables
    bag_search_steps,  # bits of num_all_bags
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread copies with one instruction; divides D
    ZERO_PADDING: tl.constexpr,  # rows of each table's padding_idx are zeroed
    BLOCK: tl.constexpr,
):
    if record_ptr is not None:
        share = num_all_bags // tl.num_programs(0) + 1
        # By the warp: BLOCK need be no power of two.
        for first in range(0, share, 32):
            in_share = first + tl.arange(0, 32)
            place = tl.program_id(0).to(tl.int64) * share + in_share
            in_range = (in_share < share) & (place <= num_all_bags)
            offset = tl.load(offsets_ptr + place, mask=in_range, other=0).to(tl.int64)
            before = tl.load(offsets_ptr + place - 1, mask=in_range & (place > 0), other=0)
            wrong = (offset < before) | (offset > num_indices) | ((place == 0) & (offset != 0))
            zero = place * 0
            record_bag_out_of_range(
                record_ptr, flag_ptr, in_range & wrong, place, offset, num_indices, zero - 1, zero
            )

    VECTORS: tl.constexpr = D // VEC
    # As in of_rows.
    LATEST: tl.constexpr = 0 if BLOCK % VECTORS == 0 else VECTORS - (VECTORS & -VECTORS)
    WINDOWS: tl.constexpr = (LATEST + BLOCK - 1) // VECTORS // 32 + 1
    group, chunk_n, first_vector = chunk_start(VECTORS, BLOCK)
    first_n = group.to(tl.int64) * BLOCK + chunk_n
    end = tl.load(offsets_ptr + num_all_bags).to(tl.int64)
    rows = ()
    for window in tl.static_range(WINDOWS):
        k, touched = window_rows(first_vector, window, VECTORS, BLOCK)
        # Lanes without a row search where another does.
        n = first_n + tl.where(touched, k, 0)
        in_range = touched & (n < num_indices)
        index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
        table = find_range(offsets_ptr, n, num_tables, num_bags, search_steps)
        num_rows = table_column(tables_ptr, table, NUM_ROWS)
        row = table_column(tables_ptr, table, FIRST_ROW) + index
        in_bag = in_range & (n < end)
        in_table = (index >= 0) & (index < num_rows)
        copied = in_bag & in_table
        if ZERO_PADDING:
            copied = copied & (index != table_column(tables_ptr, table, PADDING_IDX))
        rows += (tl.where(copied, row, -1),)
        if record_ptr is not None:
            bad = in_bag & ~in_table
            if tl.max(bad.to(tl.int32), 0) > 0:
                bag = find_range(offsets_ptr, n, num_all_bags, 1, bag_search_steps)
                begin = tl.load(offsets_ptr + bag).to(tl.int64)
                record_bag_out_of_range(
                    record_ptr,
                    flag_ptr,
                    bad,
                    n,
                    index,
                    num_rows,
                    bag - table * num_bags + 1,
                    tl.where(bag == 0, 0, begin),
                    table_column(tables_ptr, table, NAME),
                )
    copy_rows(
        weight_ptr,
        rows,
        VECTORS,
        1,
        output_ptr,
        first_vector,
        num_indices - first_n,
        D,
        VEC,
        BLOCK,
    )


# grid:  (cdiv(num_indices, BLOCK),)
# tile:  BLOCK positions
# owner: program i: positions [i * BLOCK, ...)
# why:   later kernels read a position's key and output bag instead of searching for them per column
@triton.jit
def table_keys_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_all_bags + 1]
    tables_ptr,  # int64 [num_tables, NUM_TABLE_COLUMNS]
    keys_ptr,  # [num_indices], as sort_keys_kernel's: each id's row, num_rows: none; or None
    output_bag_ptr,  # [num_indices]: b * num_tables + t, -1: in no bag; or None
    sizes_ptr,  # int32 [num_all_bags], zero on entry: each output bag's divisor, 1 but for means; or None
    num_indices,
    num_bags,  # per table
    num_all_bags,
    num_tables,
    num_rows,  # of all tables
    search_steps,  # bits of num_all_bags; if output_bag_ptr is None, of num_tables
    BLOCK: tl.constexpr,
):
    n = block_positions(BLOCK)  # [BLOCK]
    in_range = n < num_indices
    in_bag = in_range & (n < tl.load(offsets_ptr + num_all_bags).to(tl.int64))
    if output_bag_ptr is None:
        table = find_range(offsets_ptr, n, num_tables, num_bags, search_steps)
    else:
        bag = find_range(offsets_ptr, n, num_all_bags, 1, search_steps)
        table = bag // num_bags
        output_bag = (bag - table * num_bags) * num_tables + table
        tl.store(
            output_bag_ptr + n,
            tl.where(in_bag, output_bag, -1).to(output_bag_ptr.dtype.element_ty),
            mask=in_range,
        )
    if keys_ptr is not None or sizes_ptr is not None:
        index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
        counted = in_bag & ~is_padding(index, table_column(tables_ptr, table, PADDING_IDX))
    if keys_ptr is not None:
        kept = counted & (index >= 0) & (index < table_column(tables_ptr, table, NUM_ROWS))
        # num_rows is the sentinel of an id without a gradient: it sorts last.
        key = tl.where(kept, table_column(tables_ptr, table, FIRST_ROW) + index, num_rows)
        store_key(keys_ptr, n, key, in_range)
    if sizes_ptr is not None:
        is_mean = table_column(tables_ptr, table, MODE) == MEAN_MODE
        begin = tl.where(bag == 0, 0, tl.load(offsets_ptr + bag).to(tl.int64))
        length = tl.load(offsets_ptr + bag + 1).to(tl.int64) - begin
        # A bag's first position adds its whole length: atomics of each position would serialize at one address.
        size = tl.where(n == begin, tl.where(is_mean, length, 1), 0)
        size -= (is_mean & ~counted).to(tl.int64)
        tl.atomic_add(
            sizes_ptr + output_bag, size.to(tl.int32), mask=in_bag & (size != 0), sem="relaxed"
        )


# grid:  (cdiv(num_bags * D / VEC, BLOCK), num_splits)
# tile:  BLOCK vectors of VEC columns, one per lane
# owner: program (i, s): vectors [i * BLOCK, ...) of the flattened grad_output, split s of each one's bag
# why:   each vector of grad_output is loaded once per split and added to every row of the bag
@triton.jit
def table_scatter_add_kernel(
    grad_output_ptr,  # [num_bags, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_all_bags + 1]
    per_sample_weights_ptr,  # grad_output's dtype, [num_indices], contiguous; None: all 1
    max_positions_ptr,  # [num_bags, D]: the argmax as a position, -1: none; None: no table has mode "max"
    tables_ptr,  # int64 [num_tables, NUM_TABLE_COLUMNS]
    table_of_column_ptr,  # int32 [D]
    grad_weight_ptr,  # fp32 or fp64, the tables' buffer
    num_indices,
    num_bags,  # per table
    num_all_bags,
    grad_row_stride,  # in units of VEC elements
    grad_col_stride,  # in elements
    D: tl.constexpr,  # total of all tables
    VEC: tl.constexpr,  # elements a thread adds with one instruction; divides every table's D
    MEAN: tl.constexpr,  # some table has mode "mean"
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,  # ids in flight per thread
    BLOCK: tl.constexpr,
):
    acc_dtype: tl.constexpr = grad_weight_ptr.dtype.element_ty
    VECTORS: tl.constexpr = D // VEC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_b = start // VECTORS
    flat_offset = (start - first_b * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    b = first_b + flat_offset // VECTORS
    column = flat_offset % VECTORS * VEC
    in_range = b < num_bags
    table = tl.load(table_of_column_ptr + column, mask=in_range, other=0).to(tl.int64)
    bag = table * num_bags + b
    offset, next_offset = load_range(offsets_ptr, bag, in_range, num_indices, num_all_bags + 1, 0)
    begin, end = clamp_range(offset, next_offset, bag, in_range, num_indices)
    first = begin
    last = end
    if SPLIT:
        length = (end - begin + tl.num_programs(1) - 1) // tl.num_programs(1)
        first = tl.minimum(begin + tl.program_id(1) * length, end)
        last = tl.minimum(first + length, end)

    num_rows = table_column(tables_ptr, table, NUM_ROWS)
    padding_idx = table_column(tables_ptr, table, PADDING_IDX)
    row_stride = load_multiple(tables_ptr, table, DIM, VEC)
    base = load_multiple(tables_ptr, table, FIRST_ELEMENT, VEC) + column
    base -= load_multiple(tables_ptr, table, FIRST_COLUMN, VEC)
    d = tl.arange(0, VEC)[None, :]  # [1, VEC]
    grad = tl.load(
        grad_output_ptr
        + (b * grad_row_stride * VEC)[:, None]
        + (column[:, None] + d).to(tl.int64) * grad_col_stride,
        mask=in_range[:, None],
        other=0,
    ).to(acc_dtype)  # [BLOCK, VEC]
    if MEAN:
        size = tl.zeros([BLOCK], tl.int64)
        for step in range(tl.max(end - begin, 0)):
            n = begin + step
            index = tl.load(indices_ptr + n, mask=n < end, other=0).to(tl.int64)
            size += ((n < end) & ~is_padding(index, padding_idx)).to(tl.int64)
        is_mean = table_column(tables_ptr, table, MODE) == MEAN_MODE
        divisor = tl.where(is_mean, tl.maximum(size, 1), 1).to(acc_dtype)[:, None]
        grad = divide(grad, tl.broadcast_to(divisor, [BLOCK, VEC]))
    if max_positions_ptr is not None:
        element = ((start + tl.arange(0, BLOCK)) * VEC)[:, None] + d
        argmax = tl.load(max_positions_ptr + element, mask=in_range[:, None], other=-1)
    for step in range(0, tl.max(last - first, 0), UNROLL):
        indices = ()
        for u in tl.static_range(UNROLL):
            n = first + step + u
            indices += (tl.load(indices_ptr + n, mask=n < last, other=0).to(tl.int64),)
        for u in tl.static_range(UNROLL):
            n = first + step + u
            index = indices[u]
            added = (n < last) & (index >= 0) & (index < num_rows) & (index != padding_idx)
            value = grad
            if per_sample_weights_ptr is not None:
                scale = tl.load(per_sample_weights_ptr + n, mask=added, other=0)
                value *= scale.to(acc_dtype)[:, None]
            mask = added[:, None]
            if max_positions_ptr is not None:
                mask = mask & contributes(tables_ptr, table, argmax, n)
            # Relaxed: nothing in this launch reads the sums.
            tl.atomic_add(
                grad_weight_ptr + (base + index * row_stride)[:, None] + d,
                value,
                mask=mask,
                sem="relaxed",
            )


# grid:  (cdiv(num_chunks, BLOCK_C), cdiv(D, BLOCK_D))
# tile:  UNROLL keys by BLOCK_C chunks by BLOCK_D columns; num_warps 1
# owner: program (i, j): chunks [i * BLOCK_C, ...); columns [j * BLOCK_D, ...) of each table that has them. JOIN: as
#        segment_sum_kernel
# why:   segment_sum_kernel for tables of different widths, with the same slots; a row's width comes from its table, so
#        columns past it are masked
@triton.jit
def table_segment_sum_kernel(
    values_ptr,  # grad_output, [num_bags, *], any strides
    order_ptr,  # [num_keys]: each key's position before the sort
    keys_ptr,  # [num_keys], sorted row numbers; keys outside [0, num_rows) are skipped
    output_bag_ptr,  # [num_indices]: b * num_tables + t, -1: in no bag
    per_sample_weights_ptr,  # [num_indices]; None: all 1
    sizes_ptr,  # int32, by output bag: the divisors of means; None: all 1. Not with per_sample_weights
    max_positions_ptr,  # [num_bags, *], contiguous: the argmax as a position; None: no table has mode "max"
    tables_ptr,  # int64 [num_tables, NUM_TABLE_COLUMNS]
    grad_weight_ptr,  # the tables' buffer; zero on entry unless IN_PLACE
    partial_ptr,  # accumulation dtype, [2 * num_chunks, D], by slot
    num_keys,
    num_rows,
    num_tables,
    chunk_size,
    value_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    value_col_stride,  # in elements
    max_position_row_stride,  # total columns of all tables
    D: tl.constexpr,  # the widest table's
    VEC: tl.constexpr,  # elements a thread loads with one instruction; divides every table's D
    JOIN: tl.constexpr,
    IN_PLACE: tl.constexpr,  # the sums are added to the rows of grad_weight; else they are stored
    UNROLL: tl.constexpr,  # rows in flight per thread
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sum_runs(
        values_ptr,
        order_ptr,
        keys_ptr,
        output_bag_ptr,
        per_sample_weights_ptr,
        sizes_ptr,
        max_positions_ptr,
        tables_ptr,
        grad_weight_ptr,
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
        LOAD_ROW=load_sum if IN_PLACE else None,
        STORE_ROW=add_sum if IN_PLACE else None,
        row_args=(grad_weight_ptr, (0, 1), True),
    )


# grid:  (cdiv(num_indices, BLOCK_N),)
# tile:  BLOCK_N positions by BLOCK_D columns, a loop over D
# owner: program i: positions [i * BLOCK_N, ...); each is the inner product of its row and its bag's gradient
# why:   each result is reduced within its program, in a fixed order
@triton.jit
def table_sample_weights_kernel(
    grad_output_ptr,  # [num_bags, *], any strides
    weight_ptr,  # the tables' buffer
    keys_ptr,  # [num_indices]: each position's row; num_rows: none
    output_bag_ptr,  # [num_indices]: b * num_tables + t, -1: in no bag
    tables_ptr,  # int64 [num_tables, NUM_TABLE_COLUMNS]
    grad_ptr,  # [num_indices]
    num_indices,
    num_rows,
    num_tables,
    grad_row_stride,  # in units of VEC elements
    grad_col_stride,  # in elements
    D: tl.constexpr,  # the widest table's
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_range = n < num_indices
    key = tl.load(keys_ptr + n, mask=in_range, other=0).to(tl.int64)
    output_bag = tl.load(output_bag_ptr + n, mask=in_range, other=-1)
    read = in_range & (output_bag >= 0) & (key < num_rows)
    output_bag = tl.maximum(output_bag, 0)
    b = output_bag // num_tables  # a 32-bit division if output bags are int32
    table = (output_bag - b * num_tables).to(tl.int64)
    b = b.to(tl.int64)
    width = load_multiple(tables_ptr, table, DIM, VEC)
    begin = row_begin(tables_ptr, table, key, VEC)
    column = load_multiple(tables_ptr, table, FIRST_COLUMN, VEC)
    total = tl.zeros([BLOCK_N, BLOCK_D], acc_dtype)
    for first in range(0, D, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
        in_row = read[:, None] & (d < width[:, None])
        value = tl.load(weight_ptr + begin[:, None] + d, mask=in_row, other=0)
        grad = tl.load(
            grad_output_ptr
            + (b * grad_row_stride * VEC)[:, None]
            + (column[:, None] + d) * grad_col_stride,
            mask=in_row,
            other=0,
        )
        total += value.to(acc_dtype) * grad.to(acc_dtype)
    tl.store(grad_ptr + n, tl.sum(total, 1).to(grad_ptr.dtype.element_ty), mask=in_range)
