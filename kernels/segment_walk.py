"""The walk of segment_sum.py over sorted keys, and the join of what it leaves; for tables and row updates too.

The arguments are described where they are called: segment_sum.py, and tables.py for tables of different widths.
"""

import triton
import triton.language as tl

from .rounding import divide
from .sort_keys import load_key
from .table_columns import DIM, FIRST_COLUMN, MAX_MODE, MODE, row_begin, table_column

# What becomes of a run's sum behind each key; one bit each. 0: it goes on to the next key. Behind a carry-in or what
# is stored the next sum begins with 0; a carry-out is its chunk's last.
CARRY_OUT = tl.constexpr(1)
CARRY_IN = tl.constexpr(2)
STORED = tl.constexpr(4)
# Of a table that takes no maxima: every position contributes.
ANY_POSITION = tl.constexpr(-2)


@triton.jit
def names_row(key, num_rows):
    return (key >= 0) & (key < num_rows)


@triton.jit
def row_of(tile, u: tl.constexpr):
    """Row u of a tile of 4 or 8 bytes an element. A lane holds all rows of its columns: compiles to nothing."""
    bits: tl.constexpr = tl.int64 if tile.dtype.primitive_bitwidth == 64 else tl.int32
    is_row = tl.arange(0, tile.shape[0])[:, None, None] == u
    # Of integers, as the compiler must not leave out that a float's -0 + 0 is 0.
    row = tl.sum(tl.where(is_row, tile.to(bits, bitcast=True), 0), 0)
    return row.to(tile.dtype, bitcast=True)


@triton.jit
def with_row(tile, u: tl.constexpr, row):
    """The tile with another row u; compiles to nothing."""
    is_row = tl.arange(0, tile.shape[0])[:, None, None] == u
    return tl.where(is_row, row[None], tile)


@triton.jit
def count_parts(
    keys_ptr, key, chunk, chunk_size, num_keys, counted, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of the ROWS chunks from `chunk` on, how many begin within the run of `key`: [BLOCK_C], 0 unless `counted`."""
    start = (tl.broadcast_to(chunk, [BLOCK_C])[None, :] + tl.arange(0, ROWS)[:, None]) * chunk_size
    mask = tl.broadcast_to(counted, [BLOCK_C])[None, :] & (start < num_keys)  # [ROWS, BLOCK_C]
    same = load_key(keys_ptr, start, mask) == tl.broadcast_to(key, [BLOCK_C])[None, :]
    return tl.sum((mask & same).to(tl.int32), 0)


@triton.jit
def owned(D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """The program's chunks [BLOCK_C] and columns [BLOCK_D], and which of these there are; int64.

    One chunk is a scalar: Triton would load what depends on a block of one anew for each of its layouts.
    """
    chunk = tl.program_id(0).to(tl.int64) * BLOCK_C
    if BLOCK_C > 1:
        chunk += tl.arange(0, BLOCK_C)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    return chunk, column, (column < D) | (D % BLOCK_D == 0)


@triton.jit
def spread(x, place):
    """x [KEYS, BLOCK_C] at the places [UNROLL, BLOCK_C], as [UNROLL, BLOCK_C, 1]."""
    return tl.gather(x, place, 0)[:, :, None]


@triton.jit
def slot_counts(partial_ptr, num_keys, chunk_size, D: tl.constexpr):
    """Where the ids of each slot lie, behind the partial sums and in their dtype."""
    return partial_ptr + 2 * tl.cdiv(num_keys, chunk_size).to(tl.int64) * D


@triton.jit
def sum_pointers(row_args, key, begin, d):
    """Pointers to the rows `key` of a segment sum's gradient; `begin`: as `row_pointers` of row_update.py."""
    row_stride, col_stride = row_args[1]
    IS_BUFFER: tl.constexpr = row_args[2]
    return row_args[0] + (begin + d if IS_BUFFER else key * row_stride + d * col_stride)


@triton.jit
def load_sum(row_args, key, begin, mask, loaded, d):
    """LOAD_ROW of a segment sum in place, ahead of the step's sums, which hides its latency."""
    grad_weight_ptr = sum_pointers(row_args, key, begin, d)
    return tl.load(grad_weight_ptr, mask=mask, other=0)


@triton.jit
def add_sum(row_args, row, key, begin, width, total, mask, stored, d):
    """STORE_ROW of a segment sum in place: one addition in the accumulation dtype, one rounding."""
    grad_weight_ptr = sum_pointers(row_args, key, begin, d)
    tl.store(grad_weight_ptr, (row.to(total.dtype) + total).to(row.dtype), mask=mask)


@triton.jit
def walk_runs(
    values_ptr,
    order_ptr,
    keys_ptr,
    bag_of_ptr,
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
    D: tl.constexpr,
    VEC: tl.constexpr,
    SCALE_GRAD_BY_FREQ: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOAD_ROW: tl.constexpr,
    STORE_ROW: tl.constexpr,
    row_args,
):
    """The first launch: stores the sums of runs within a chunk, and the carries of the others."""
    acc_dtype: tl.constexpr = (
        tl.float64 if grad_weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    chunk, column, in_row = owned(D, BLOCK_C, BLOCK_D)
    d = column[None, None, :]  # [1, 1, BLOCK_D]
    start = chunk * chunk_size
    # The first run of a chunk began earlier if it is this key's.
    key_before = load_key(keys_ptr, start - 1, (start > 0) & (start < num_keys))
    # Sentinels come last: behind one there are no others.
    begins_in_table = (start == 0) | names_row(key_before, num_rows)
    length = tl.where(begins_in_table, tl.minimum(num_keys - start, chunk_size), 0)
    chunk = tl.broadcast_to(chunk, [BLOCK_C])
    start = tl.broadcast_to(start, [BLOCK_C])
    length = tl.broadcast_to(length, [BLOCK_C])
    key_before = tl.broadcast_to(key_before, [BLOCK_C])
    # As many as make one coalesced load of a warp.
    KEYS: tl.constexpr = UNROLL if 32 // BLOCK_C < UNROLL else 32 // BLOCK_C
    # Rows that are not read need zeros in two cases only. A position in no bag may lie before others of its chunk,
    # and the callbacks take squares of whole rows. Else such rows come last in their chunk, and reach no sum.
    FILL: tl.constexpr = None if bag_of_ptr is None and LOAD_ROW is None else 0
    total = tl.zeros([BLOCK_C, BLOCK_D], acc_dtype)
    carry_in = tl.zeros([BLOCK_C, BLOCK_D], acc_dtype)
    count = tl.zeros([BLOCK_C, BLOCK_D], tl.int32)
    carry_in_count = tl.zeros([BLOCK_C, BLOCK_D], tl.int32)
    crossed = tl.zeros([BLOCK_C], tl.int32)
    longest = tl.max(length, 0)
    for step in range(0, longest, KEYS):
        position = start[None, :] + step + tl.arange(0, KEYS)[:, None]  # [KEYS, BLOCK_C]
        inside = position < (start + length)[None, :]
        key = load_key(keys_ptr, position, inside)
        next_key = load_key(keys_ptr, position + 1, inside & (position + 1 < num_keys))
        taken = inside & names_row(key, num_rows)
        ends = key != next_key
        carried = (start[None, :] > 0) & (key == key_before[None, :])
        leaves = taken & (ends | (position + 1 == (start + chunk_size)[None, :]))
        target = tl.where(carried, CARRY_IN, tl.where(ends, STORED, CARRY_OUT))
        target = tl.where(leaves, target, 0)
        # Each at most once a chunk.
        crossed += tl.sum(target & (CARRY_IN | CARRY_OUT), 0)
        n = tl.load(order_ptr + position, mask=taken, other=0).to(tl.int64)
        value_row = n
        if bag_of_ptr is not None:
            bag = tl.load(bag_of_ptr + n, mask=taken, other=0)
            taken = taken & (bag >= 0)
            bag = tl.maximum(bag, 0)
            value_row = bag.to(tl.int64)
            if per_sample_weights_ptr is not None:
                scale = tl.load(per_sample_weights_ptr + n, mask=taken, other=0).to(acc_dtype)
            elif sizes_ptr is not None:
                size = tl.load(sizes_ptr + bag, mask=taken, other=1).to(acc_dtype)
                scale = divide(tl.full(size.shape, 1, acc_dtype), size)
        # Vectors of VEC elements, for the compiler to see the alignment.
        if tables_ptr is None:
            value = value_row * value_row_stride
            begin = key * (D // VEC)
        else:
            b = bag // num_tables  # a 32-bit division if output bags are int32
            table = (bag - b * num_tables).to(tl.int64)
            first_column = table_column(tables_ptr, table, FIRST_COLUMN)
            value = b.to(tl.int64) * value_row_stride + first_column // VEC * value_col_stride
            begin = row_begin(tables_ptr, table, key) // VEC
            width = table_column(tables_ptr, table, DIM)
            if max_positions_ptr is not None:
                is_max = table_column(tables_ptr, table, MODE) == MAX_MODE
                argmax_of = tl.where(is_max, n, ANY_POSITION)
                max_position = b.to(tl.int64) * max_position_row_stride + first_column
        value = tl.where(taken, value, -1)
        for first in range(0, tl.minimum(longest - step, KEYS), UNROLL):
            place = (first + tl.arange(0, UNROLL)).to(tl.int32)
            place = tl.broadcast_to(place[:, None], [UNROLL, BLOCK_C])
            # From here on in the layout of the tile: a lane has the whole column.
            row_value = spread(value, place)
            row_target = spread(target, place)
            row_key = spread(key, place)
            row_begins = spread(begin, place) * VEC
            row_width = row_key * 0 + D
            inside_row = in_row[None, None, :]
            if tables_ptr is not None:
                row_width = spread(width, place)
                inside_row = d < row_width // VEC * VEC
            # One a column, so that those of a row are in the lanes that hold it.
            targets = row_target + (d * 0).to(tl.int32)
            stored = (targets == STORED) & inside_row
            read = (row_value >= 0) & inside_row
            values = tl.load(
                values_ptr + row_value * VEC + d * value_col_stride, mask=read, other=FILL
            )  # [UNROLL, BLOCK_C, BLOCK_D]
            if max_positions_ptr is not None:
                argmax_ptr = max_positions_ptr + spread(max_position, place) + d
                argmax = tl.load(argmax_ptr, mask=read, other=-1)
                position_taken = spread(argmax_of, place)
                values = tl.where(
                    (position_taken == ANY_POSITION) | (argmax.to(tl.int64) == position_taken),
                    values,
                    0,
                )
            if LOAD_ROW is not None:
                row_stored = row_target == STORED
                rows = LOAD_ROW(row_args, row_key, row_begins, stored, row_stored, d)
            sums = values.to(acc_dtype)
            if per_sample_weights_ptr is not None or sizes_ptr is not None:
                sums *= spread(scale, place)
            counted = (row_value >= 0).to(tl.int32) + (d * 0).to(tl.int32)
            counts = counted
            for u in tl.static_range(UNROLL):
                total += row_of(sums, u)
                sums = with_row(sums, u, total)
                becomes = row_of(targets, u)
                total = tl.where(becomes >= CARRY_IN, 0, total)
                if SCALE_GRAD_BY_FREQ:
                    count += row_of(counted, u)
                    counts = with_row(counts, u, count)
                    count = tl.where(becomes >= CARRY_IN, 0, count)
            # Once a chunk at most: not worth an instruction of each row.
            if tl.max(tl.max(tl.gather(target, place, 0) & CARRY_IN, 0), 0) > 0:
                for u in tl.static_range(UNROLL):
                    is_carry_in = row_of(targets, u) == CARRY_IN
                    carry_in = tl.where(is_carry_in, row_of(sums, u), carry_in)
                    if SCALE_GRAD_BY_FREQ:
                        carry_in_count = tl.where(is_carry_in, row_of(counts, u), carry_in_count)
            if SCALE_GRAD_BY_FREQ:
                sums = divide(sums, tl.maximum(counts, 1).to(acc_dtype))
            if STORE_ROW is None:
                row = sums.to(grad_weight_ptr.dtype.element_ty)
                tl.store(grad_weight_ptr + row_begins + d, row, mask=stored)
            # An update is skipped, not masked: it costs more than the branch.
            elif tl.max(tl.max(tl.gather(target, place, 0), 0), 0) == STORED:
                STORE_ROW(
                    row_args, rows, row_key, row_begins, row_width, sums, stored, row_stored, d
                )

    d = column[None, :]
    goes_in = ((crossed & CARRY_IN) != 0)[:, None] & in_row[None, :]
    goes_out = ((crossed & CARRY_OUT) != 0)[:, None] & in_row[None, :]
    if partial_ptr is None:
        last_key = load_key(keys_ptr, start + length - 1, length > 0)
        grad_weight_ptr = sum_pointers(row_args, key_before[:, None], (key_before * D)[:, None], d)
        tl.atomic_add(grad_weight_ptr, carry_in, mask=goes_in, sem="relaxed")
        grad_weight_ptr = sum_pointers(row_args, last_key[:, None], (last_key * D)[:, None], d)
        tl.atomic_add(grad_weight_ptr, total, mask=goes_out, sem="relaxed")
    else:
        carry_in_ptr = partial_ptr + (2 * chunk * D)[:, None] + d
        tl.store(carry_in_ptr, carry_in, mask=goes_in)
        tl.store(carry_in_ptr + D, total, mask=goes_out)
        if SCALE_GRAD_BY_FREQ:
            # The lanes of column 0 store the counts.
            count_ptr = slot_counts(partial_ptr, num_keys, chunk_size, D) + 2 * chunk[:, None] + d
            tl.store(count_ptr, carry_in_count.to(acc_dtype), mask=goes_in & (d == 0))
            tl.store(count_ptr + 1, count.to(acc_dtype), mask=goes_out & (d == 0))


@triton.jit
def join_carries(
    order_ptr,
    keys_ptr,
    bag_of_ptr,
    tables_ptr,
    grad_weight_ptr,
    partial_ptr,
    num_keys,
    num_rows,
    num_tables,
    chunk_size,
    D: tl.constexpr,
    SCALE_GRAD_BY_FREQ: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
    LOAD_ROW: tl.constexpr,
    STORE_ROW: tl.constexpr,
    row_args,
):
    """The second launch: of each run that crosses an edge, the sum of its carries, to where it begins."""
    chunk, column, in_row = owned(D, BLOCK_C, BLOCK_D)
    d = column[None, None, :]  # [1, 1, BLOCK_D]
    start = chunk * chunk_size
    last = start + chunk_size - 1
    key = load_key(keys_ptr, last, last < num_keys)
    goes_on = names_row(key, num_rows)
    parts = count_parts(keys_ptr, key, chunk + 1, chunk_size, num_keys, goes_on, ROWS, BLOCK_C)
    joined = parts > 0
    if BLOCK_C == 1:
        joined = tl.max(joined.to(tl.int32), 0) > 0
    # A run that fills the chunk began earlier, and is another program's.
    key_before = load_key(keys_ptr, start - 1, joined & (start > 0))
    joined = joined & ((start == 0) | (key_before != key))
    begin = key * D
    width = key * 0 + D
    inside_row = in_row[None, None, :]
    if tables_ptr is not None:
        n = tl.load(order_ptr + last, mask=joined, other=0)
        bag = tl.load(bag_of_ptr + n, mask=joined, other=0)
        table = (bag % num_tables).to(tl.int64)
        begin = row_begin(tables_ptr, table, key) // VEC * VEC
        width = tl.broadcast_to(table_column(tables_ptr, table, DIM), [BLOCK_C])
        inside_row = d < (width // VEC * VEC)[None, :, None]
    chunk = tl.broadcast_to(chunk, [BLOCK_C])
    key = tl.broadcast_to(key, [BLOCK_C])
    begin = tl.broadcast_to(begin, [BLOCK_C])
    width = tl.broadcast_to(width, [BLOCK_C])
    joined = tl.broadcast_to(joined, [BLOCK_C])
    parts = tl.where(joined, parts, 0)
    stored = joined[None, :, None]
    row_key = key[None, :, None]
    begin = begin[None, :, None]
    if LOAD_ROW is not None:
        rows = LOAD_ROW(row_args, row_key, begin, stored & inside_row, stored, d)

    # Most runs have no more parts than these two.
    carry_out_ptr = partial_ptr + ((2 * chunk + 1) * D)[:, None] + column[None, :]
    added = joined[:, None] & in_row[None, :]
    total = tl.load(carry_out_ptr, mask=added, other=0)
    total += tl.load(carry_out_ptr + D, mask=added, other=0)
    if SCALE_GRAD_BY_FREQ:
        count_ptr = slot_counts(partial_ptr, num_keys, chunk_size, D) + 2 * chunk + 1
        count = tl.load(count_ptr, mask=joined, other=0)
        count += tl.load(count_ptr + 1, mask=joined, other=0)
    row = tl.arange(0, ROWS)[:, None]
    first = chunk + 2
    counted = chunk + 1 + ROWS
    goes_on = parts == ROWS
    parts -= 1
    while tl.max(parts, 0) > 0:
        slot = 2 * (first[None, :] + row)  # [ROWS, BLOCK_C]
        taken = row < parts[None, :]
        carry_in_ptr = partial_ptr + (slot * D)[:, :, None] + d
        mask = taken[:, :, None] & in_row[None, None, :]
        values = tl.load(carry_in_ptr, mask=mask, other=0)  # [ROWS, BLOCK_C, BLOCK_D]
        if SCALE_GRAD_BY_FREQ:
            part_ptr = slot_counts(partial_ptr, num_keys, chunk_size, D) + slot
            count += tl.sum(tl.load(part_ptr, mask=taken, other=0), 0)
        # Under way before the values are there.
        first = counted
        counted += ROWS
        parts = count_parts(keys_ptr, key, first, chunk_size, num_keys, goes_on, ROWS, BLOCK_C)
        goes_on = parts == ROWS
        for u in tl.static_range(ROWS):
            total += row_of(values, u)
    total = total[None]  # [1, BLOCK_C, BLOCK_D]
    if SCALE_GRAD_BY_FREQ:
        divisor = tl.maximum(count, 1)[None, :, None]
        total = divide(total, tl.broadcast_to(divisor, total.shape))
    if STORE_ROW is None:
        total = total.to(grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + begin + d, total, mask=stored & inside_row)
    elif tl.max(joined.to(tl.int32), 0) > 0:
        STORE_ROW(
            row_args,
            rows,
            row_key,
            begin,
            width[None, :, None],
            total,
            stored & inside_row,
            stored,
            d,
        )


@triton.jit
def sum_runs(
    values_ptr,
    order_ptr,
    keys_ptr,
    bag_of_ptr,
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
    D: tl.constexpr,
    VEC: tl.constexpr,
    SCALE_GRAD_BY_FREQ: tl.constexpr,
    JOIN: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOAD_ROW: tl.constexpr = None,  # None: a complete sum is stored; else the callbacks update the row by it
    STORE_ROW: tl.constexpr = None,
    row_args=None,
):
    """One of the two launches."""
    if JOIN:
        join_carries(
            order_ptr,
            keys_ptr,
            bag_of_ptr,
            tables_ptr,
            grad_weight_ptr,
            partial_ptr,
            num_keys,
            num_rows,
            num_tables,
            chunk_size,
            D,
            SCALE_GRAD_BY_FREQ,
            2 * UNROLL,
            BLOCK_C,
            BLOCK_D,
            VEC,
            LOAD_ROW,
            STORE_ROW,
            row_args,
        )
    else:
        walk_runs(
            values_ptr,
            order_ptr,
            keys_ptr,
            bag_of_ptr,
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
            D,
            VEC,
            SCALE_GRAD_BY_FREQ,
            UNROLL,
            BLOCK_C,
            BLOCK_D,
            LOAD_ROW,
            STORE_ROW,
            row_args,
        )
