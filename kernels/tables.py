"""Many tables, one launch: bags, rows and gradients of tables that lie one behind another in a buffer.

`tables_ptr` tells where: int64 [num_tables, NUM_FIELDS], half a cache line a table. Bags are table-major: the
ids of bag b of table t lie from offsets[t * num_bags + b] up to the next offset. A row's number counts the rows
of all tables before it too. Offsets are kept within the ids whatever they say.
"""

import triton
import triton.language as tl

from .bag import clamp_range, is_padding, load_range, record_offsets
from .bounds import record_bag_out_of_range
from .rounding import divide

# The columns of tables_ptr.
FIRST_ROW = tl.constexpr(0)  # its first row's number
NUM_ROWS = tl.constexpr(1)
FIRST_ELEMENT = tl.constexpr(2)  # where it begins in the buffer
DIM = tl.constexpr(3)
FIRST_COLUMN = tl.constexpr(4)  # where its columns begin in the output
MODE = tl.constexpr(5)
PADDING_IDX = tl.constexpr(6)  # -1: none
NAME = tl.constexpr(7)  # the number of its name
NUM_FIELDS = tl.constexpr(8)
# What MODE holds; 0 is a sum.
MEAN_MODE = tl.constexpr(1)
MAX_MODE = tl.constexpr(2)


@triton.jit
def load_field(tables_ptr, table, field: tl.constexpr):
    """What is known of each of these tables."""
    return tl.load(tables_ptr + table * NUM_FIELDS + field)


@triton.jit
def load_multiple(tables_ptr, table, field: tl.constexpr, VEC: tl.constexpr):
    """The same of a number that VEC divides, so that the compiler sees the alignment."""
    return load_field(tables_ptr, table, field) // VEC * VEC


@triton.jit
def row_begin(tables_ptr, table, row, VEC: tl.constexpr):
    """Where in the buffer these rows of these tables begin."""
    first = load_multiple(tables_ptr, table, FIRST_ELEMENT, VEC)
    row_in_table = row - load_field(tables_ptr, table, FIRST_ROW)
    return first + row_in_table * load_multiple(tables_ptr, table, DIM, VEC)


@triton.jit
def find_range(offsets_ptr, n, num_ranges, range_bags, search_steps):
    """The last of these ranges, each of so many bags, that begins at position n or before it."""
    low = n * 0
    high = low + num_ranges
    for _ in range(search_steps):
        middle = (low + high) // 2
        begun = (middle == 0) | (tl.load(offsets_ptr + middle * range_bags).to(tl.int64) <= n)
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def has_won(tables_ptr, table, winner, n):
    """Where position n may hand its row on: everywhere but in a maximum that another position is."""
    is_max = load_field(tables_ptr, table, MODE) == MAX_MODE
    return ~is_max[:, None] | (winner.to(tl.int64) == n[:, None])


# Program (i, s) owns vectors [i * BLOCK, ...) of the output, each of its own bag, and the s-th of as many equal
# parts of each bag as the grid is deep. So no lane idles, whatever the tables' widths; lanes side by side walk
# the same bag, or the next table's.
@triton.jit
def table_bag_kernel(
    weight_ptr,  # the tables' buffer
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_tables * num_bags + 1]
    per_sample_weights_ptr,  # weight's dtype, [num_indices], contiguous; None: all 1
    tables_ptr,  # int64 [num_tables, NUM_FIELDS]
    table_of_column_ptr,  # int32 [D]
    output_ptr,  # [num_bags, D]; SPLIT: the parts' sums in the accumulation dtype, [num_splits, num_bags, D]
    sizes_ptr,  # int64 [num_splits, num_bags, D]: SPLIT and MEAN: what the parts divide by, in sum; else None
    # int32 or int64 [num_bags, D]: the position that is the maximum, -1: none. MAX: written, or None; else read, as
    # what a table's maximum is to be, or None: no table has mode "max".
    winner_ptr,
    record_ptr,  # int64 [7], or None: do not record
    flag_ptr,  # int32 [1], pinned host memory, or None
    num_indices,
    num_bags,  # of each table
    num_all_bags,
    D: tl.constexpr,  # of all tables together
    VEC: tl.constexpr,  # elements a thread loads with one instruction; divides every table's D
    MEAN: tl.constexpr,  # whether any table takes means
    MAX: tl.constexpr,  # whether any table takes maxima, which are to be found; not with SPLIT
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,  # rows in flight a thread
    BLOCK: tl.constexpr,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    VECTORS: tl.constexpr = D // VEC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_b = start // VECTORS
    lane = (start - first_b * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    b = first_b + lane // VECTORS
    column = lane % VECTORS * VEC
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

    num_rows = load_field(tables_ptr, table, NUM_ROWS)
    padding_idx = load_field(tables_ptr, table, PADDING_IDX)
    row_stride = load_multiple(tables_ptr, table, DIM, VEC)
    column_in_table = column - load_multiple(tables_ptr, table, FIRST_COLUMN, VEC)
    base = load_multiple(tables_ptr, table, FIRST_ELEMENT, VEC) + column_in_table
    d = tl.arange(0, VEC)[None, :]  # [1, VEC]
    out = ((start + tl.arange(0, BLOCK)) * VEC)[:, None] + d

    total = tl.zeros([BLOCK, VEC], acc_dtype)
    size = tl.zeros([BLOCK], tl.int64)
    if MAX:
        is_max = load_field(tables_ptr, table, MODE) == MAX_MODE
        winner = tl.full([BLOCK, VEC], -1, tl.int64)
        empty = in_range
    elif winner_ptr is not None:
        winner = tl.load(winner_ptr + out, mask=in_range[:, None], other=-1)
    bad_n = tl.full([BLOCK], -1, tl.int64)
    bad_index = tl.zeros([BLOCK], tl.int64)
    for step in range(0, tl.max(last - first, 0), UNROLL):
        # All loads of a step are issued before the first sum needs one.
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
                # Not `>=`, so that the first of equals stays, and so does a NaN that came first.
                better = (kept & is_max)[:, None] & (empty[:, None] | (value > total))
                winner = tl.where(better, n[:, None], winner)
                total = tl.where(is_max[:, None], tl.where(better, value, total), total + value)
                empty = empty & ~kept
            elif winner_ptr is not None:
                total += tl.where(has_won(tables_ptr, table, winner, first + step + u), value, 0)
            else:
                total += value

    if MEAN:
        is_mean = load_field(tables_ptr, table, MODE) == MEAN_MODE
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
    if MAX and winner_ptr is not None:
        tl.store(winner_ptr + out, winner.to(winner_ptr.dtype.element_ty), mask=in_range[:, None])
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
            load_field(tables_ptr, table, NAME),
        )
        record_offsets(
            record_ptr,
            flag_ptr,
            bag,
            reports,
            begin,
            end,
            offset,
            next_offset,
            num_indices,
        )


# Program i owns BLOCK consecutive vectors of the output, whatever rows they lie in, and checks its share of the
# offsets.
@triton.jit
def table_gather_kernel(
    weight_ptr,  # [rows of all tables, D], contiguous
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_all_bags + 1]
    tables_ptr,  # int64 [num_tables, NUM_FIELDS]
    output_ptr,  # [num_indices, D]
    record_ptr,  # int64 [7], or None: do not record
    flag_ptr,  # int32 [1], pinned host memory, or None
    num_indices,
    num_bags,  # of each table
    num_all_bags,
    num_tables,
    search_steps,  # bits of num_tables
    bag_search_steps,  # bits of num_all_bags
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread copies with one instruction; divides D
    ZERO_PADDING: tl.constexpr,  # whether rows of each table's padding become zero
    BLOCK: tl.constexpr,
):
    if record_ptr is not None:
        share = num_all_bags // tl.num_programs(0) + 1
        for first in range(0, share, BLOCK):
            in_share = first + tl.arange(0, BLOCK)
            place = tl.program_id(0).to(tl.int64) * share + in_share
            in_range = (in_share < share) & (place <= num_all_bags)
            offset = tl.load(offsets_ptr + place, mask=in_range, other=0).to(tl.int64)
            before = tl.load(offsets_ptr + place - 1, mask=in_range & (place > 0), other=0)
            wrong = (offset < before) | (offset > num_indices) | ((place == 0) & (offset != 0))
            zero = place * 0
            record_bag_out_of_range(
                record_ptr,
                flag_ptr,
                in_range & wrong,
                place,
                offset,
                num_indices,
                zero - 1,
                zero,
            )

    VECTORS: tl.constexpr = D // VEC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_n = start // VECTORS
    lane = (start - first_n * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    n = first_n + lane // VECTORS
    vector = lane % VECTORS
    in_range = n < num_indices
    index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
    table = find_range(offsets_ptr, n, num_tables, num_bags, search_steps)
    end = tl.load(offsets_ptr + num_all_bags).to(tl.int64)
    num_rows = load_field(tables_ptr, table, NUM_ROWS)
    row = load_field(tables_ptr, table, FIRST_ROW) + index
    in_bag = in_range & (n < end)
    in_table = (index >= 0) & (index < num_rows)
    copied = in_bag & in_table
    if ZERO_PADDING:
        copied = copied & (index != load_field(tables_ptr, table, PADDING_IDX))

    d = (vector * VEC)[:, None] + tl.arange(0, VEC)[None, :]  # [BLOCK, VEC]
    values = tl.load(weight_ptr + (row * D)[:, None] + d, mask=copied[:, None], other=0)
    out = ((start + tl.arange(0, BLOCK)) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    tl.store(output_ptr + out, values, mask=in_range[:, None])
    if record_ptr is not None:
        bad = in_bag & ~in_table & (vector == 0)
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
                load_field(tables_ptr, table, NAME),
            )


# Program i owns positions [i * BLOCK, ...).
@triton.jit
def table_keys_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_all_bags + 1]
    tables_ptr,  # int64 [num_tables, NUM_FIELDS]
    keys_ptr,  # the narrowest integer dtype that holds num_rows, [num_indices]: the row of each id; or None
    sources_ptr,  # [num_indices]: bag b of table t is b * num_tables + t, -1: no bag; or None
    sizes_ptr,  # int32 [num_all_bags], zero on entry: what divides the gradient of each source; or None
    num_indices,
    num_bags,  # of each table
    num_all_bags,
    num_tables,
    num_rows,  # of all tables
    search_steps,  # bits of num_all_bags if there are sources, else of num_tables
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    in_range = n < num_indices
    in_bag = in_range & (n < tl.load(offsets_ptr + num_all_bags).to(tl.int64))
    if sources_ptr is None:
        table = find_range(offsets_ptr, n, num_tables, num_bags, search_steps)
    else:
        bag = find_range(offsets_ptr, n, num_all_bags, 1, search_steps)
        table = bag // num_bags
        source = (bag - table * num_bags) * num_tables + table
        tl.store(
            sources_ptr + n,
            tl.where(in_bag, source, -1).to(sources_ptr.dtype.element_ty),
            mask=in_range,
        )
    if keys_ptr is not None or sizes_ptr is not None:
        index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
        counted = in_bag & ~is_padding(index, load_field(tables_ptr, table, PADDING_IDX))
    if keys_ptr is not None:
        kept = counted & (index >= 0) & (index < load_field(tables_ptr, table, NUM_ROWS))
        # Ids without a gradient sort behind all others.
        key = tl.where(kept, load_field(tables_ptr, table, FIRST_ROW) + index, num_rows)
        tl.store(keys_ptr + n, key.to(keys_ptr.dtype.element_ty), mask=in_range)
    if sizes_ptr is not None:
        is_mean = load_field(tables_ptr, table, MODE) == MEAN_MODE
        begin = tl.where(bag == 0, 0, tl.load(offsets_ptr + bag).to(tl.int64))
        length = tl.load(offsets_ptr + bag + 1).to(tl.int64) - begin
        # The first position of a bag adds all of them, so that the others need not queue at one address.
        size = tl.where(n == begin, tl.where(is_mean, length, 1), 0)
        size -= (is_mean & ~counted).to(tl.int64)
        tl.atomic_add(
            sizes_ptr + source, size.to(tl.int32), mask=in_bag & (size != 0), sem="relaxed"
        )


# Program (i, s) owns vectors [i * BLOCK, ...) of grad_output, which it adds to each row of the s-th part of their
# bags.
@triton.jit
def table_scatter_add_kernel(
    grad_output_ptr,  # [num_bags, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_all_bags + 1]
    per_sample_weights_ptr,  # grad_output's dtype, [num_indices], contiguous; None: all 1
    winner_ptr,  # [num_bags, D]: the position that is the maximum, -1: none; None: no table has mode "max"
    tables_ptr,  # int64 [num_tables, NUM_FIELDS]
    table_of_column_ptr,  # int32 [D]
    grad_weight_ptr,  # fp32 or fp64, the tables' buffer, zero on entry
    num_indices,
    num_bags,  # of each table
    num_all_bags,
    grad_row_stride,  # in units of VEC elements
    grad_col_stride,  # in elements
    D: tl.constexpr,  # of all tables together
    VEC: tl.constexpr,  # elements a thread adds with one instruction; divides every table's D
    MEAN: tl.constexpr,  # whether any table takes means
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,  # ids in flight a thread
    BLOCK: tl.constexpr,
):
    VECTORS: tl.constexpr = D // VEC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_b = start // VECTORS
    lane = (start - first_b * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    b = first_b + lane // VECTORS
    column = lane % VECTORS * VEC
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

    num_rows = load_field(tables_ptr, table, NUM_ROWS)
    padding_idx = load_field(tables_ptr, table, PADDING_IDX)
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
    )  # [BLOCK, VEC]
    if MEAN:
        size = tl.zeros([BLOCK], tl.int64)
        for step in range(tl.max(end - begin, 0)):
            n = begin + step
            index = tl.load(indices_ptr + n, mask=n < end, other=0).to(tl.int64)
            size += ((n < end) & ~is_padding(index, padding_idx)).to(tl.int64)
        is_mean = load_field(tables_ptr, table, MODE) == MEAN_MODE
        divisor = tl.where(is_mean, tl.maximum(size, 1), 1).to(grad.dtype)[:, None]
        grad = divide(grad, tl.broadcast_to(divisor, [BLOCK, VEC]))
    if winner_ptr is not None:
        place = ((start + tl.arange(0, BLOCK)) * VEC)[:, None] + d
        winner = tl.load(winner_ptr + place, mask=in_range[:, None], other=-1)
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
                value *= tl.load(per_sample_weights_ptr + n, mask=added, other=0)[:, None]
            mask = added[:, None]
            if winner_ptr is not None:
                mask = mask & has_won(tables_ptr, table, winner, n)
            # Nothing in this launch reads the sums, so no ordering is asked for.
            tl.atomic_add(
                grad_weight_ptr + (base + index * row_stride)[:, None] + d,
                value.to(grad_weight_ptr.dtype.element_ty),
                mask=mask,
                sem="relaxed",
            )


# As segment_sum_kernel, for tables of different widths: program (i, j) owns chunks [i * BLOCK_C, ...) of the
# sorted keys, one a row of its tile, and columns [j * BLOCK_D, ...) of each table that has them.
@triton.jit
def table_segment_sum_kernel(
    values_ptr,  # [num_bags, *], any strides: grad_output; or [num_keys, D]: partial sums of the level below
    order_ptr,  # [num_keys]: the position that belongs to each key; None: a level of partial sums
    keys_ptr,  # [num_keys], sorted row numbers; those outside [0, num_rows) take no part
    key_tables_ptr,  # int32 [num_keys]: each partial sum's table; None: that of its position
    sources_ptr,  # [positions]: bag b of table t is b * num_tables + t, -1: none; None: a level of partial sums
    per_sample_weights_ptr,  # one a position: multiplies its gradient; None: 1
    sizes_ptr,  # int32, one a source: divides its gradient; None: 1. Not both
    winner_ptr,  # [num_bags, *], contiguous: the position that is the maximum; None: no table has mode "max"
    tables_ptr,  # int64 [num_tables, NUM_FIELDS]
    grad_weight_ptr,  # the tables' buffer, zero on entry
    partial_values_ptr,  # accumulation dtype, [2 * num_chunks, D]: row 2c leads chunk c, 2c + 1 trails it
    partial_keys_ptr,  # int64 [2 * num_chunks]; -1: no such partial sum
    partial_tables_ptr,  # int32 [2 * num_chunks]
    num_keys,
    num_rows,
    num_tables,
    value_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    value_col_stride,  # in elements
    winner_row_stride,  # columns of all tables
    D: tl.constexpr,  # of the widest table
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,  # loads in flight a thread; divides CHUNK
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOAD_ROW: tl.constexpr = None,  # None: a complete sum is stored; else what table_row_update_kernel does with it
    STORE_ROW: tl.constexpr = None,
    row_args=None,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if grad_weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    chunk = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    start = chunk * CHUNK

    key_before = tl.load(keys_ptr + start - 1, mask=(start > 0) & (start <= num_keys), other=-1)
    key = tl.load(keys_ptr + start, mask=start < num_keys, other=-1).to(tl.int64)
    first_columns = (start < num_keys) & (tl.program_id(1) == 0)
    # True while the run at hand began in an earlier chunk.
    leading = (start > 0) & (key == key_before.to(tl.int64)) & (key >= 0) & (key < num_rows)
    lead_key = key

    total = tl.zeros([BLOCK_C, BLOCK_D], acc_dtype)
    lead_total = tl.zeros([BLOCK_C, BLOCK_D], acc_dtype)
    lead_table = tl.zeros([BLOCK_C], tl.int64)
    table = tl.zeros([BLOCK_C], tl.int64)
    leads = leading
    run_ends = leading
    longest = tl.minimum(num_keys - tl.program_id(0).to(tl.int64) * BLOCK_C * CHUNK, CHUNK)
    for step in range(0, longest, UNROLL):
        # All loads of a step are issued before the first sum needs one.
        keys = ()
        values = ()
        scales = ()
        tables = ()
        rows = ()
        for u in tl.static_range(UNROLL):
            position = start + step + u
            next_key = tl.load(keys_ptr + position + 1, mask=position + 1 < num_keys, other=-1).to(
                tl.int64
            )
            keys += (next_key,)
            here = key if u == 0 else keys[u - 1]
            taken = (position < num_keys) & (here >= 0) & (here < num_rows)
            row = position
            column = position * 0
            if order_ptr is None:
                here_table = tl.load(key_tables_ptr + position, mask=taken, other=0).to(tl.int64)
            else:
                place = tl.load(order_ptr + position, mask=taken, other=0)
                source = tl.load(sources_ptr + place, mask=taken, other=0)
                row = source // num_tables  # in 32 bits wherever they hold a source
                here_table = (source - row * num_tables).to(tl.int64)
                row = row.to(tl.int64)
                column = load_multiple(tables_ptr, here_table, FIRST_COLUMN, VEC)
                if per_sample_weights_ptr is not None:
                    scale = tl.load(per_sample_weights_ptr + place, mask=taken, other=0)
                    scales += (scale.to(acc_dtype),)
                elif sizes_ptr is not None:
                    size = tl.load(sizes_ptr + source, mask=taken, other=1).to(acc_dtype)
                    scales += (divide(tl.full([BLOCK_C], 1, acc_dtype), size),)
            tables += (here_table,)
            in_row = d < load_multiple(tables_ptr, here_table, DIM, VEC)[:, None]
            value = tl.load(
                values_ptr
                + (row * value_row_stride * VEC)[:, None]
                + (column[:, None] + d) * value_col_stride,
                mask=taken[:, None] & in_row,
                other=0,
            )  # [BLOCK_C, BLOCK_D]
            if winner_ptr is not None:
                winner = tl.load(
                    winner_ptr + (row * winner_row_stride + column)[:, None] + d,
                    mask=taken[:, None] & in_row,
                    other=-1,
                )
                won = has_won(tables_ptr, here_table, winner, place.to(tl.int64))
                value = tl.where(won, value, 0)
            values += (value,)
            if LOAD_ROW is not None:
                ends = taken & (here != next_key) & ~(leads & (here == lead_key))
                begin = row_begin(tables_ptr, here_table, here, VEC)
                rows += (LOAD_ROW(row_args, here, begin, ends[:, None] & in_row, ends, d),)
        for u in tl.static_range(UNROLL):
            position = start + step + u
            value = values[u].to(acc_dtype)
            if per_sample_weights_ptr is not None or sizes_ptr is not None:
                value *= scales[u][:, None]
            total += value
            table = tables[u]
            run_ends = (position < num_keys) & (key != keys[u])
            stored = run_ends & ~leading & (key >= 0) & (key < num_rows)
            begin = row_begin(tables_ptr, table, key, VEC)
            width = load_multiple(tables_ptr, table, DIM, VEC)
            mask = stored[:, None] & (d < width[:, None])
            if STORE_ROW is None:
                row = total.to(grad_weight_ptr.dtype.element_ty)
                tl.store(grad_weight_ptr + begin[:, None] + d, row, mask=mask)
            # An update costs more than a mask.
            elif tl.max(stored.to(tl.int32), 0) > 0:
                STORE_ROW(row_args, rows[u], key, begin, width, total, mask, stored, d)
            lead_ends = run_ends & leading
            lead_total = tl.where(lead_ends[:, None], total, lead_total)
            lead_table = tl.where(lead_ends, table, lead_table)
            total = tl.where(run_ends[:, None], 0, total)
            leading = leading & ~run_ends
            key = keys[u]

    # The run at hand goes on in the next chunk.
    trailing = (start + CHUNK < num_keys) & ~run_ends & (key >= 0) & (key < num_rows)
    # A run that fills the whole chunk is its leading sum; a trailing zero keeps its keys adjacent.
    fills = trailing & leading
    lead_total = tl.where(fills[:, None], total, lead_total)
    lead_table = tl.where(fills, table, lead_table)
    total = tl.where(fills[:, None], 0, total)
    lead_ptr = partial_values_ptr + (2 * chunk * D)[:, None] + d
    tl.store(lead_ptr, lead_total, mask=leads[:, None] & (d < D))
    tl.store(lead_ptr + D, total, mask=trailing[:, None] & (d < D))
    tl.store(partial_keys_ptr + 2 * chunk, tl.where(leads, lead_key, -1), mask=first_columns)
    tl.store(partial_keys_ptr + 2 * chunk + 1, tl.where(trailing, key, -1), mask=first_columns)
    tl.store(partial_tables_ptr + 2 * chunk, lead_table.to(tl.int32), mask=leads & first_columns)
    tl.store(partial_tables_ptr + 2 * chunk + 1, table.to(tl.int32), mask=trailing & first_columns)


# Program i owns positions [i * BLOCK_N, ...): the inner product of each one's row and its bag's gradient.
@triton.jit
def table_sample_weights_kernel(
    grad_output_ptr,  # [num_bags, *], any strides
    weight_ptr,  # the tables' buffer
    keys_ptr,  # [num_indices]: the row of each position; num_rows: none
    sources_ptr,  # [num_indices]: bag b of table t is b * num_tables + t
    tables_ptr,  # int64 [num_tables, NUM_FIELDS]
    grad_ptr,  # [num_indices]
    num_indices,
    num_rows,
    num_tables,
    grad_row_stride,  # in units of VEC elements
    grad_col_stride,  # in elements
    D: tl.constexpr,  # of the widest table
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
    source = tl.load(sources_ptr + n, mask=in_range, other=-1)
    read = in_range & (source >= 0) & (key < num_rows)
    source = tl.maximum(source, 0)
    b = source // num_tables  # in 32 bits wherever they hold a source
    table = (source - b * num_tables).to(tl.int64)
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
