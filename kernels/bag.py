"""Bags: the sum, mean or maximum of each bag's rows; every row is read once.

Bag b is ids [offsets[b], offsets[b + 1]), the last bag ends with the ids; without offsets each bag has bag_length ids.
Wrong offsets are clamped to [0, num_indices].

A bag longer than chunk_length is cut, so that no program walks all of it. Its head is its first chunk_length ids;
behind the head it is cut at chunk edges. Each chunk c has two slots of partial sums: slot 2c holds the head of the
bag that starts in chunk c, slot 2c + 1 the carry-in: ids of chunk c that a bag has behind its head.

    ids      0   1   2   3 | 4   5   6   7 | 8   9  10  11     chunk_length 4
    bags     A   A   B   B   B   B   B   B   B   B   C   C
    sums     [ A ]   [   slot 0    ] [slot 3][slot 5][ C ]     A and C are short: stored directly

A cut bag reaches into the next chunk, so at most one starts in each chunk, and at most one is carried in. Who walks the
carry-in of a chunk sees whether the bag's head lies in the chunk before, and notes the bag there: bag_join_kernel finds
at once what there is to join. The cuts depend on offsets and shapes alone, so the order of the additions is the same
from run to run.
"""

import triton
import triton.language as tl

from .bounds import local_row, record_bag_out_of_range
from .lanes import block_positions
from .rounding import divide


@triton.jit
def load_range(offsets_ptr, bag, in_range, num_indices, num_offsets, bag_length):
    """Each bag's [begin, end) as the offsets have it, int64; not clamped."""
    if offsets_ptr is None:
        begin = bag * bag_length
        end = begin + bag_length
    else:
        begin = tl.load(offsets_ptr + bag, mask=in_range, other=0).to(tl.int64)
        has_next = in_range & (bag + 1 < num_offsets)
        next_offset = tl.load(offsets_ptr + bag + 1, mask=has_next, other=0).to(tl.int64)
        end = tl.where(has_next, next_offset, num_indices)
    return begin, end


@triton.jit
def clamp_range(begin, end, bag, in_range, num_indices):
    """[begin, end) clamped to [0, num_indices]; bag 0 begins at 0. Empty unless in_range."""
    begin = tl.where(bag == 0, 0, tl.minimum(tl.maximum(begin, 0), num_indices))
    end = tl.minimum(tl.maximum(end, begin), num_indices)
    return tl.where(in_range, begin, 0), tl.where(in_range, end, 0)


@triton.jit
def find_bag(offsets_ptr, n, num_bags, bag_length, search_steps):
    """Binary search: the last bag that begins at or before each position n, int64."""
    if offsets_ptr is None:
        bag = n // bag_length
    else:
        # Invariant: offsets[low] <= n < offsets[high].
        low = n * 0
        high = low + num_bags
        for _ in range(search_steps):
            middle = (low + high) // 2
            begun = (middle == 0) | (tl.load(offsets_ptr + middle).to(tl.int64) <= n)
            low = tl.where(begun, middle, low)
            high = tl.where(begun, high, middle)
        bag = low
    return bag


@triton.jit
def is_padding(index, padding_idx):
    """padding_idx = -1 disables padding: an out-of-range id of -1 must not match it."""
    return (index == padding_idx) & (index >= 0)


@triton.jit
def count_ids(
    indices_ptr,
    record_ptr,
    flag_ptr,
    bag,
    begin,
    first,
    last,
    table_rows,
    padding_idx,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Count the ids in [first, last) of each bag that are not padding, int32 [BLOCK_B]; record those out of range.

    Coalesced loads of BLOCK_L ids; the loop over the rows then finds the ids in the cache.
    """
    counted = tl.zeros([BLOCK_B, BLOCK_L], tl.int32)
    for step in range(0, tl.max(last - first, 0), BLOCK_L):
        n = first[:, None] + step + tl.arange(0, BLOCK_L)[None, :]  # [BLOCK_B, BLOCK_L]
        index = tl.load(indices_ptr + n, mask=n < last[:, None], other=0).to(tl.int64)
        inside = n < last[:, None]
        counted += (inside & ~is_padding(index, padding_idx)).to(tl.int32)
        if record_ptr is not None:
            record_bag_out_of_range(
                record_ptr,
                flag_ptr,
                inside & ((index < 0) | (index >= table_rows)),
                n,
                index,
                table_rows,
                n * 0 + bag[:, None] + 1,
                n * 0 + begin[:, None],
            )
    return tl.sum(counted, 1)


@triton.jit
def record_offsets(
    record_ptr, flag_ptr, bag, in_range, begin, end, offset, next_offset, num_indices
):
    """Record an offset that clamping changed: the bag's own, or else the next one."""
    own = offset != begin
    record_bag_out_of_range(
        record_ptr,
        flag_ptr,
        in_range & (own | (next_offset != end)),
        tl.where(own, bag, bag + 1),
        tl.where(own, offset, next_offset),
        num_indices,
        bag * 0 - 1,
        begin,
    )


@triton.jit
def find_part(
    offsets_ptr,
    num_indices,
    num_bags,
    num_offsets,
    bag_length,
    chunk_length,
    search_steps,
    CUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """For each row of the program's tile: its bag, and the positions [first, last) of it to walk.

    The first cdiv(num_bags, BLOCK_B) programs own bags, or the heads of cut bags. With CUT, further programs own the
    carry-ins of chunks.

    Returns bag, in_range, begin, end, offset, next_offset, first, last, slot, chunk: each [BLOCK_B]; slot -1: a whole
    bag; chunk -1: no carry-in.
    """
    bag = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_range = bag < num_bags
    chunk = bag * 0 - 1
    if CUT:
        bag_programs = tl.cdiv(num_bags, BLOCK_B)
        if tl.program_id(0) >= bag_programs:
            chunk = bag - bag_programs.to(tl.int64) * BLOCK_B
            in_range = chunk * chunk_length < num_indices
            start = tl.where(in_range, chunk * chunk_length, 0)
            bag = find_bag(offsets_ptr, start, num_bags, bag_length, search_steps)
    offset, next_offset = load_range(
        offsets_ptr, bag, in_range, num_indices, num_offsets, bag_length
    )
    begin, end = clamp_range(offset, next_offset, bag, in_range, num_indices)
    first = begin
    last = end
    slot = chunk
    if CUT:
        is_carry_in = chunk >= 0
        first = tl.where(is_carry_in, tl.maximum(begin + chunk_length, chunk * chunk_length), begin)
        last = tl.where(is_carry_in, (chunk + 1) * chunk_length, begin + chunk_length)
        last = tl.maximum(tl.minimum(last, end), first)
        head = tl.where(end - begin > chunk_length, 2 * (begin // chunk_length), -1)
        slot = tl.where(is_carry_in, 2 * chunk + 1, head)
    return bag, in_range, begin, end, offset, next_offset, first, last, slot, chunk


@triton.jit
def to_row_layout(x, d):
    """x [BLOCK_B], converted to the layout of a tile's rows; d: the tile's columns.

    The layout is converted once, outside the loop. Triton would convert what is loaded at x in each iteration, as it
    cannot move the search that x comes from.
    """
    return tl.max(x[:, None] + d * 0, 1)


# grid:  (cdiv(num_bags, BLOCK_B) + cdiv(num_chunks, BLOCK_B), cdiv(D, BLOCK_D))
# tile:  BLOCK_B bags or carry-ins by BLOCK_D columns; num_warps 1: no barrier
# owner: program (i, j): bags [i * BLOCK_B, ...), or behind those the carry-ins of chunks; columns [j * BLOCK_D, ...)
# why:   each tile row sums one bag; the loop runs to the tile's longest bag, shorter rows are masked
@triton.jit(do_not_specialize=["first_row"])  # one binary for all ranks
def bag_sum_kernel(
    weight_ptr,  # [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_offsets]; None: equal lengths
    per_sample_weights_ptr,  # weight's dtype, [num_indices], contiguous; None: all 1
    output_ptr,  # [num_bags, D]
    partial_ptr,  # accumulation dtype, [2 * num_chunks, D], by slot; None: no bag is cut
    sizes_ptr,  # MEAN: int64 [2 * num_chunks]: each slot's ids but padding; else None
    cut_bags_ptr,  # int64 [num_chunks]: the cut bag whose head lies in the chunk before, -1: none; None: no bag is cut
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_bags,
    num_offsets,
    bag_length,  # without offsets: ids per bag
    chunk_length,
    search_steps,  # bits of num_bags
    num_embeddings,
    first_row,  # of this shard in a table of table_rows rows, which has the ids; None: no shard
    table_rows,  # None: no shard
    padding_idx,  # -1: none
    weight_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    weight_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    MEAN: tl.constexpr,
    UNROLL: tl.constexpr,  # rows in flight per thread
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,  # ids of each bag counted per step
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    in_row = d < D
    bag, in_range, begin, end, offset, next_offset, first, last, slot, chunk = find_part(
        offsets_ptr,
        num_indices,
        num_bags,
        num_offsets,
        bag_length,
        chunk_length,
        search_steps,
        partial_ptr is not None,
        BLOCK_B,
    )
    first_columns = tl.program_id(1) == 0
    if partial_ptr is not None:
        follows_head = (end - begin > chunk_length) & (begin // chunk_length == chunk - 1)
        tl.store(
            cut_bags_ptr + chunk,
            tl.where(follows_head, bag, -1),
            mask=in_range & (chunk >= 0) & first_columns,
        )
        first = to_row_layout(first, d)
        last = to_row_layout(last, d)

    size = last - first
    if record_ptr is not None:
        if offsets_ptr is not None:
            record_offsets(
                record_ptr,
                flag_ptr,
                bag,
                in_range & first_columns,
                begin,
                end,
                offset,
                next_offset,
                num_indices,
            )
        if first_columns | (MEAN & (padding_idx >= 0)):
            size = count_ids(
                indices_ptr,
                record_ptr,
                flag_ptr,
                bag,
                begin,
                first,
                last,
                num_embeddings if table_rows is None else table_rows,
                padding_idx,
                BLOCK_B,
                BLOCK_L,
            ).to(tl.int64)
    elif MEAN:
        if padding_idx >= 0:
            size = count_ids(
                indices_ptr,
                None,
                None,
                bag,
                begin,
                first,
                last,
                num_embeddings if table_rows is None else table_rows,
                padding_idx,
                BLOCK_B,
                BLOCK_L,
            ).to(tl.int64)

    total = tl.zeros([BLOCK_B, BLOCK_D], acc_dtype)
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
            row = local_row(index, first_row)
            in_table = (row >= 0) & (row < num_embeddings)
            taken = (n < last) & (index != padding_idx)
            value = tl.load(
                weight_ptr + (row * weight_row_stride * VEC)[:, None] + d * weight_col_stride,
                mask=(taken & in_table)[:, None] & in_row,
                other=0,
            )  # [BLOCK_B, BLOCK_D]
            values += (value,)
            if per_sample_weights_ptr is not None:
                scale = tl.load(per_sample_weights_ptr + n, mask=taken & in_table, other=0)
                scales += (scale.to(acc_dtype),)
        for u in tl.static_range(UNROLL):
            value = values[u].to(acc_dtype)
            if per_sample_weights_ptr is not None:
                value *= scales[u][:, None]
            total += value

    if partial_ptr is not None:
        cut = in_range & (slot >= 0) & (first < last)
        tl.store(partial_ptr + (slot * D)[:, None] + d, total, mask=cut[:, None] & in_row)
        if MEAN:
            tl.store(sizes_ptr + slot, size, mask=cut & first_columns)
    if MEAN:
        divisor = tl.maximum(size, 1).to(acc_dtype)[:, None]
        total = divide(total, tl.broadcast_to(divisor, [BLOCK_B, BLOCK_D]))
    tl.store(
        output_ptr + (bag * D)[:, None] + d,
        total.to(output_ptr.dtype.element_ty),
        mask=(in_range & (slot < 0))[:, None] & in_row,
    )


@triton.jit
def join_parts(
    partial_ptr,
    sizes_ptr,
    output_ptr,
    bag,
    chunk,
    num_parts,
    d,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums of a bag whose head lies in `chunk`; d: columns."""
    total = tl.zeros([BLOCK_S, BLOCK], partial_ptr.dtype.element_ty)
    size = tl.zeros([BLOCK_S], tl.int64)
    for first in range(0, num_parts, BLOCK_S):
        part = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        # Part 0 is the head, each later one the carry-in of a chunk.
        slot = 2 * (chunk + part) + (part > 0).to(tl.int64)
        taken = part < num_parts
        total += tl.load(
            partial_ptr + (slot * D)[:, None] + d[None, :],
            mask=taken[:, None] & (d < D)[None, :],
            other=0,
        )
        if sizes_ptr is not None:
            size += tl.load(sizes_ptr + slot, mask=taken, other=0)
    output = tl.sum(total, 0)
    if sizes_ptr is not None:
        divisor = tl.maximum(tl.sum(size, 0), 1).to(output.dtype)
        output = divide(output, tl.full([BLOCK], divisor, output.dtype))
    tl.store(output_ptr + bag * D + d, output.to(output_ptr.dtype.element_ty), mask=d < D)


# grid:  (cdiv(num_chunks, BLOCK_C), cdiv(D, BLOCK))
# tile:  BLOCK_S parts by BLOCK columns, a loop over the parts
# owner: program (i, j): chunks [i * BLOCK_C, ...), and of each the cut bag whose head lies in the chunk before, if any;
#        columns [j * BLOCK, ...)
# why:   adds a bag's partial sums in a fixed order: no atomics, deterministic; as a rule there is nothing to add
@triton.jit
def bag_join_kernel(
    partial_ptr,  # accumulation dtype, [2 * num_chunks, D], by slot
    sizes_ptr,  # mean: int64 [2 * num_chunks]: each slot's ids but padding; sum: None
    cut_bags_ptr,  # int64 [num_chunks]: the cut bag whose head lies in the chunk before, -1: none
    offsets_ptr,  # any integer dtype, [num_offsets]; None: equal lengths
    output_ptr,  # [num_bags, D]
    num_indices,
    num_bags,
    num_offsets,
    bag_length,  # without offsets: ids per bag
    chunk_length,
    num_chunks,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_chunk = tl.program_id(0).to(tl.int64) * BLOCK_C
    chunks = first_chunk + tl.arange(0, BLOCK_C)
    cut_bags = tl.load(cut_bags_ptr + chunks, mask=chunks < num_chunks, other=-1)
    if tl.max((cut_bags >= 0).to(tl.int32), 0) > 0:
        d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)  # [BLOCK]
        for c in range(BLOCK_C):
            chunk = first_chunk + c
            bag = tl.load(cut_bags_ptr + chunk, mask=chunk < num_chunks, other=-1)
            if bag >= 0:
                begin, end = load_range(
                    offsets_ptr, bag, bag >= 0, num_indices, num_offsets, bag_length
                )
                begin, end = clamp_range(begin, end, bag, bag >= 0, num_indices)
                num_parts = (end - 1) // chunk_length - (chunk - 1) + 1
                join_parts(
                    partial_ptr,
                    sizes_ptr,
                    output_ptr,
                    bag,
                    chunk - 1,
                    num_parts,
                    d,
                    D,
                    BLOCK_S,
                    BLOCK,
                )


# grid:  (cdiv(num_bags, BLOCK_B), cdiv(D, BLOCK_D))
# tile:  BLOCK_B bags by BLOCK_D columns; num_warps 1: no barrier
# owner: program (i, j): bags [i * BLOCK_B, ...), columns [j * BLOCK_D, ...)
# why:   never cuts a bag: with cuts, Triton 3.7 keeps the maxima in two layouts, which triples the instructions of
#        16-bit tables
@triton.jit(do_not_specialize=["first_row"])  # one binary for all ranks
def bag_max_kernel(
    weight_ptr,  # [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_offsets]; None: equal lengths
    output_ptr,  # [num_bags, D]
    argmax_ptr,  # int64 [num_bags, D]: id * D + column, of a shard the position; -1: none; None: not wanted
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_bags,
    num_offsets,
    bag_length,  # without offsets: ids per bag
    num_embeddings,
    first_row,  # of this shard in a table of table_rows rows, which has the ids; None: no shard
    table_rows,  # None: no shard
    padding_idx,  # -1: none
    weight_row_stride,  # in units of VEC elements
    weight_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    UNROLL: tl.constexpr,  # rows in flight per thread
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,  # ids of each bag counted per step
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    bag = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    in_row = d < D
    in_range = bag < num_bags
    offset, next_offset = load_range(
        offsets_ptr, bag, in_range, num_indices, num_offsets, bag_length
    )
    begin, end = clamp_range(offset, next_offset, bag, in_range, num_indices)

    if record_ptr is not None:
        if tl.program_id(1) == 0:
            if offsets_ptr is not None:
                record_offsets(
                    record_ptr,
                    flag_ptr,
                    bag,
                    in_range,
                    begin,
                    end,
                    offset,
                    next_offset,
                    num_indices,
                )
            count_ids(
                indices_ptr,
                record_ptr,
                flag_ptr,
                bag,
                begin,
                begin,
                end,
                num_embeddings if table_rows is None else table_rows,
                padding_idx,
                BLOCK_B,
                BLOCK_L,
            )

    largest = tl.zeros([BLOCK_B, BLOCK_D], acc_dtype)
    argmax = tl.full([BLOCK_B, BLOCK_D], -1, tl.int64)
    empty = in_range
    # Of a shard: no id of the bag is before, of whatever rows of the whole table.
    leads = in_range
    for step in range(0, tl.max(end - begin, 0), UNROLL):
        indices = ()
        values = ()
        for u in tl.static_range(UNROLL):
            n = begin + step + u
            index = tl.load(indices_ptr + n, mask=n < end, other=0).to(tl.int64)
            indices += (index,)
        for u in tl.static_range(UNROLL):
            index = indices[u]
            taken = (begin + step + u < end) & (index != padding_idx)
            row = local_row(index, first_row)
            in_table = (row >= 0) & (row < num_embeddings)
            value = tl.load(
                weight_ptr + (row * weight_row_stride * VEC)[:, None] + d * weight_col_stride,
                mask=(taken & in_table)[:, None] & in_row,
                other=0,
            )  # [BLOCK_B, BLOCK_D]
            values += (value,)
        for u in tl.static_range(UNROLL):
            n = begin + step + u
            index = indices[u]
            row = local_row(index, first_row)
            in_table = (row >= 0) & (row < num_embeddings)
            taken = (n < end) & (index != padding_idx)
            value = values[u].to(acc_dtype)
            first = empty[:, None]
            place = index
            if first_row is not None:
                # NaN is the largest only where it leads the whole bag; what comes behind it is then the first.
                first = (argmax < 0) & (leads[:, None] | (value == value))
                leads = leads & ~(taken & (index >= 0) & (index < table_rows))
                place = n
            # `>`, not `>=`: the first of equals stays, as does a NaN in the bag's first row.
            better = (taken & in_table)[:, None] & (first | (value > largest))
            largest = tl.where(better, value, largest)
            argmax = tl.where(better, place[:, None], argmax)
            empty = empty & ~(taken & in_table)

    out = (bag * D)[:, None] + d
    stored = in_range[:, None] & in_row
    tl.store(output_ptr + out, largest.to(output_ptr.dtype.element_ty), mask=stored)
    if argmax_ptr is not None:
        if first_row is None:
            argmax = tl.where(argmax < 0, -1, argmax * D + d)
        tl.store(argmax_ptr + out, argmax, mask=stored)


# grid:  (cdiv(num_indices, BLOCK),)
# tile:  BLOCK positions
# owner: program i: positions [i * BLOCK, ...)
# why:   the gradient kernels read a position's bag instead of searching for it per column
@triton.jit
def bag_of_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_offsets]; None: equal lengths
    bag_of_ptr,  # an integer dtype that holds num_bags, [num_indices]; -1: in no bag
    sizes_ptr,  # mean: int32 [num_bags], zero on entry: each bag's ids but padding; else None
    num_indices,
    num_bags,
    num_offsets,
    bag_length,  # without offsets: ids per bag
    padding_idx,  # -1: none
    search_steps,  # bits of num_bags
    BLOCK: tl.constexpr,
):
    n = block_positions(BLOCK)  # [BLOCK]
    in_range = n < num_indices
    bag = find_bag(offsets_ptr, n, num_bags, bag_length, search_steps)
    if offsets_ptr is not None:
        if num_offsets > num_bags:
            bag = tl.where(n < tl.load(offsets_ptr + num_bags).to(tl.int64), bag, -1)
    tl.store(bag_of_ptr + n, bag.to(bag_of_ptr.dtype.element_ty), mask=in_range)
    if sizes_ptr is not None:
        index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
        counted = in_range & (bag >= 0) & ~is_padding(index, padding_idx)
        bag = tl.where(in_range, bag, tl.max(tl.where(in_range, bag, -1), 0))
        lowest = tl.min(bag, 0)
        if (lowest == tl.max(bag, 0)) & (lowest >= 0):
            # All of one bag: one atomic, as atomics of a long bag would serialize at one address.
            tl.atomic_add(sizes_ptr + lowest, tl.sum(counted.to(tl.int32), 0), sem="relaxed")
        else:
            tl.atomic_add(sizes_ptr + bag, 1, mask=counted, sem="relaxed")


# grid:  (cdiv(num_indices, BLOCK_N),)
# tile:  BLOCK_N positions by BLOCK_D columns, a loop over D
# owner: program i: positions [i * BLOCK_N, ...); each is the inner product of its row and its bag's gradient
# why:   each result is reduced within its program, in a fixed order
@triton.jit(do_not_specialize=["first_row"])  # one binary for all ranks
def bag_sample_weights_kernel(
    grad_output_ptr,  # [num_bags, D], any strides
    weight_ptr,  # [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    bag_of_ptr,  # [num_indices]; -1: in no bag
    grad_ptr,  # [num_indices]
    num_indices,
    num_embeddings,
    first_row,  # of this shard in a larger table, which has the ids; None: no shard
    padding_idx,  # -1: none
    grad_row_stride,  # in units of VEC elements
    grad_col_stride,  # in elements
    weight_row_stride,  # in units of VEC elements
    weight_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_range = n < num_indices
    index = tl.load(indices_ptr + n, mask=in_range, other=-1).to(tl.int64)
    bag = tl.load(bag_of_ptr + n, mask=in_range, other=-1).to(tl.int64)
    table_row = local_row(index, first_row)
    read = in_range & (bag >= 0) & (table_row >= 0) & (table_row < num_embeddings)
    read = read & (index != padding_idx)
    total = tl.zeros([BLOCK_N, BLOCK_D], acc_dtype)
    for first in range(0, D, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
        in_row = read[:, None] & (d < D)
        row = tl.load(
            weight_ptr + (table_row * weight_row_stride * VEC)[:, None] + d * weight_col_stride,
            mask=in_row,
            other=0,
        )
        grad = tl.load(
            grad_output_ptr + (bag * grad_row_stride * VEC)[:, None] + d * grad_col_stride,
            mask=in_row,
            other=0,
        )
        total += row.to(acc_dtype) * grad.to(acc_dtype)
    tl.store(grad_ptr + n, tl.sum(total, 1).to(grad_ptr.dtype.element_ty), mask=in_range)
