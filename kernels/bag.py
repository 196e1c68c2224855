"""Bags: the sum, the mean or the largest of the rows that each bag of ids names, read once.

Bag b holds the positions from offsets[b] up to offsets[b + 1], or to the last position where there is no such offset;
without offsets all bags are equally long. Offsets are kept within the ids whatever they say.

Where a bag may be too long for one program, the ids are cut into chunks of chunk_length, and a bag longer than that
into parts: a head of that length, and what lies behind the head in each chunk. A chunk has no more than one head,
of the bag that begins in it, and behind heads no more than one bag, that of its first position; so part 2 * c is
the head that begins in chunk c, and part 2 * c + 1 what chunk c has of a bag behind its head. Where the cuts are
follows from the offsets and the shapes alone, so the order of the additions is the same from run to run.
"""

import triton
import triton.language as tl

from .bounds import record_bag_out_of_range
from .rounding import divide


@triton.jit
def load_range(offsets_ptr, bag, in_range, num_indices, num_offsets, bag_length):
    """Where each bag begins and ends, as offsets have it, int64; without offsets, from equal lengths."""
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
    """The range within [0, num_indices], beginning at 0 for bag 0; empty for bags that do not exist."""
    begin = tl.where(bag == 0, 0, tl.minimum(tl.maximum(begin, 0), num_indices))
    end = tl.minimum(tl.maximum(end, begin), num_indices)
    return tl.where(in_range, begin, 0), tl.where(in_range, end, 0)


@triton.jit
def find_bag(offsets_ptr, n, num_bags, bag_length, search_steps):
    """The last bag that begins at each position or before it, int64."""
    if offsets_ptr is None:
        bag = n // bag_length
    else:
        # offsets[low] <= n < offsets[high].
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
    """Whether an id is the padding: -1 is none, and no padding where it stands for there being none."""
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
    num_embeddings,
    padding_idx,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Ids other than padding in [first, last) of each bag, int32 [BLOCK_B]; those out of range are recorded.

    Reads the ids side by side, ahead of the loop over their rows, which then finds them in the cache.
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
                inside & ((index < 0) | (index >= num_embeddings)),
                n,
                index,
                num_embeddings,
                n * 0 + bag[:, None] + 1,
                n * 0 + begin[:, None],
            )
    return tl.sum(counted, 1)


@triton.jit
def record_offsets(
    record_ptr, flag_ptr, bag, in_range, begin, end, offset, next_offset, num_indices
):
    """Record offsets that do not cut the ids into bags."""
    # The one at fault is the bag's own, or the next one.
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
def part_range(
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
    """The bags of a program's rows, and the positions [first, last) of each that the program walks.

    The first programs own bags, whole or their heads. With CUT there are others behind them, which own chunks.

    Returns bag, in_range, begin, end, offset, next_offset, first, last, number: each [BLOCK_B]; the number is
    that of the part, or -1 for a bag as a whole.
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
    number = chunk
    if CUT:
        of_chunk = chunk >= 0
        first = tl.where(of_chunk, tl.maximum(begin + chunk_length, chunk * chunk_length), begin)
        last = tl.where(of_chunk, (chunk + 1) * chunk_length, begin + chunk_length)
        last = tl.maximum(tl.minimum(last, end), first)
        head = tl.where(end - begin > chunk_length, 2 * (begin // chunk_length), -1)
        number = tl.where(of_chunk, 2 * chunk + 1, head)
    return bag, in_range, begin, end, offset, next_offset, first, last, number


@triton.jit
def lay_along_rows(x, d):
    """x [BLOCK_B] as it is, in the lanes that hold the rows of a tile whose columns are d.

    What is loaded at x then lies there too; Triton would move it there in every turn of a loop, as it cannot move
    the search that x comes from.
    """
    return tl.max(x[:, None] + d * 0, 1)


# Program (i, j) owns bags [i * BLOCK_B, ...), one a row of its tile, and columns [j * BLOCK_D, ...); with partial_ptr
# the programs behind those of the bags own chunks. The rows of the tile walk side by side and exchange nothing but
# the longest length.
@triton.jit
def bag_sum_kernel(
    weight_ptr,  # [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_offsets]; None: equal lengths
    per_sample_weights_ptr,  # weight's dtype, [num_indices], contiguous; None: all 1
    output_ptr,  # [num_bags, D]
    partial_ptr,  # accumulation dtype, [2 * num_chunks, D]: the parts' sums; None: no bag is cut
    sizes_ptr,  # int64 [2 * num_chunks]: MEAN: the parts' ids that count; else None
    record_ptr,  # int64 [7], or None: do not record
    flag_ptr,  # int32 [1], pinned host memory, or None
    num_indices,
    num_bags,
    num_offsets,
    bag_length,  # ids a bag, where there are no offsets
    chunk_length,
    search_steps,  # bits of num_bags
    num_embeddings,
    padding_idx,  # -1: none
    weight_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    weight_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    MEAN: tl.constexpr,
    UNROLL: tl.constexpr,  # rows in flight a thread
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,  # ids of each bag that are counted at a time
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    in_row = d < D
    bag, in_range, begin, end, offset, next_offset, first, last, number = part_range(
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
    if partial_ptr is not None:
        first = lay_along_rows(first, d)
        last = lay_along_rows(last, d)

    first_columns = tl.program_id(1) == 0
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
                num_embeddings,
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
                num_embeddings,
                padding_idx,
                BLOCK_B,
                BLOCK_L,
            ).to(tl.int64)

    total = tl.zeros([BLOCK_B, BLOCK_D], acc_dtype)
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
            in_table = (index >= 0) & (index < num_embeddings)
            taken = (n < last) & (index != padding_idx)
            value = tl.load(
                weight_ptr + (index * weight_row_stride * VEC)[:, None] + d * weight_col_stride,
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
        cut = in_range & (number >= 0) & (first < last)
        tl.store(partial_ptr + (number * D)[:, None] + d, total, mask=cut[:, None] & in_row)
        if MEAN:
            tl.store(sizes_ptr + number, size, mask=cut & first_columns)
    if MEAN:
        divisor = tl.maximum(size, 1).to(acc_dtype)[:, None]
        total = divide(total, tl.broadcast_to(divisor, [BLOCK_B, BLOCK_D]))
    tl.store(
        output_ptr + (bag * D)[:, None] + d,
        total.to(output_ptr.dtype.element_ty),
        mask=(in_range & (number < 0))[:, None] & in_row,
    )


@triton.jit
def joined_bag(
    offsets_ptr, num_indices, num_bags, num_offsets, bag_length, chunk_length, search_steps
):
    """The bag whose head begins in the chunk of the program, and how many parts it has; 0: there is none."""
    chunk = tl.program_id(0).to(tl.int64)
    # It goes on in the next chunk.
    place = (chunk + 1) * chunk_length + tl.zeros([1], tl.int64)
    in_range = place < num_indices
    place = tl.where(in_range, place, 0)
    bag = find_bag(offsets_ptr, place, num_bags, bag_length, search_steps)
    begin, end = load_range(offsets_ptr, bag, in_range, num_indices, num_offsets, bag_length)
    begin, end = clamp_range(begin, end, bag, in_range, num_indices)
    is_cut = (begin // chunk_length == chunk) & (end - begin > chunk_length)
    num_parts = tl.where(is_cut, (end - 1) // chunk_length - chunk + 1, 0)
    return tl.sum(bag, 0), tl.sum(num_parts, 0)


# Program (c, j) owns the cut bag that begins in chunk c, if there is one, and columns [j * BLOCK, ...): the sums of its
# parts, added in a fixed order.
@triton.jit
def bag_join_kernel(
    partial_ptr,  # accumulation dtype, [2 * num_chunks, D]
    sizes_ptr,  # int64 [2 * num_chunks]: ids that count for the mean; None: the sum is asked for
    offsets_ptr,  # any integer dtype, [num_offsets]; None: equal lengths
    output_ptr,  # [num_bags, D]
    num_indices,
    num_bags,
    num_offsets,
    bag_length,  # ids a bag, where there are no offsets
    chunk_length,
    search_steps,  # bits of num_bags
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)  # [BLOCK]
    bag, num_parts = joined_bag(
        offsets_ptr, num_indices, num_bags, num_offsets, bag_length, chunk_length, search_steps
    )
    if num_parts > 0:
        total = tl.zeros([BLOCK_S, BLOCK], partial_ptr.dtype.element_ty)
        size = tl.zeros([BLOCK_S], tl.int64)
        for first in range(0, num_parts, BLOCK_S):
            place = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
            # The head, and then what the chunks behind it have.
            number = 2 * (tl.program_id(0) + place) + (place > 0).to(tl.int64)
            taken = place < num_parts
            total += tl.load(
                partial_ptr + (number * D)[:, None] + d[None, :],
                mask=taken[:, None] & (d < D)[None, :],
                other=0,
            )
            if sizes_ptr is not None:
                size += tl.load(sizes_ptr + number, mask=taken, other=0)
        output = tl.sum(total, 0)
        if sizes_ptr is not None:
            divisor = tl.maximum(tl.sum(size, 0), 1).to(output.dtype)
            output = divide(output, tl.full([BLOCK], divisor, output.dtype))
        tl.store(output_ptr + bag * D + d, output.to(output_ptr.dtype.element_ty), mask=d < D)


# Program i owns elements [i * BLOCK, ...) of the output: the sums of split bags' parts, added in a fixed order.
@triton.jit
def bag_combine_kernel(
    partial_ptr,  # accumulation dtype, [num_splits, num_bags, D]
    sizes_ptr,  # int64 [num_splits, num_bags]: ids that count for the mean; None: the sum is asked for
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


# As bag_sum_kernel, of whole bags alone: where maxima are cut too, Triton 3.7 walks them in two layouts, in three times
# the instructions for 16-bit tables.
@triton.jit
def bag_max_kernel(
    weight_ptr,  # [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_offsets]; None: equal lengths
    output_ptr,  # [num_bags, D]
    winner_ptr,  # int64 [num_bags, D]: id * D + column of the largest, -1: none; None: not wanted
    record_ptr,  # int64 [7], or None: do not record
    flag_ptr,  # int32 [1], pinned host memory, or None
    num_indices,
    num_bags,
    num_offsets,
    bag_length,  # ids a bag, where there are no offsets
    num_embeddings,
    padding_idx,  # -1: none
    weight_row_stride,  # in units of VEC elements
    weight_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    UNROLL: tl.constexpr,  # rows in flight a thread
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,  # ids of each bag that are counted at a time
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
                num_embeddings,
                padding_idx,
                BLOCK_B,
                BLOCK_L,
            )

    largest = tl.zeros([BLOCK_B, BLOCK_D], acc_dtype)
    winner = tl.full([BLOCK_B, BLOCK_D], -1, tl.int64)
    empty = in_range
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
            in_table = (index >= 0) & (index < num_embeddings)
            value = tl.load(
                weight_ptr + (index * weight_row_stride * VEC)[:, None] + d * weight_col_stride,
                mask=(taken & in_table)[:, None] & in_row,
                other=0,
            )  # [BLOCK_B, BLOCK_D]
            values += (value,)
        for u in tl.static_range(UNROLL):
            n = begin + step + u
            index = indices[u]
            in_table = (index >= 0) & (index < num_embeddings)
            taken = (n < end) & (index != padding_idx)
            value = values[u].to(acc_dtype)
            # Not `>=`, so that the first of equals stays, and so does a NaN that came first.
            better = (taken & in_table)[:, None] & (empty[:, None] | (value > largest))
            largest = tl.where(better, value, largest)
            winner = tl.where(better, index[:, None], winner)
            empty = empty & ~(taken & in_table)

    out = (bag * D)[:, None] + d
    stored = in_range[:, None] & in_row
    tl.store(output_ptr + out, largest.to(output_ptr.dtype.element_ty), mask=stored)
    if winner_ptr is not None:
        tl.store(winner_ptr + out, tl.where(winner < 0, -1, winner * D + d), mask=stored)


# Program i owns positions [i * BLOCK, ...).
@triton.jit
def bag_of_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    offsets_ptr,  # any integer dtype, [num_offsets]; None: equal lengths
    bag_of_ptr,  # an integer dtype that holds num_bags, [num_indices]: the bag of each position, -1: none
    sizes_ptr,  # int32 [num_bags], zero on entry: ids that count for the mean; None: not wanted
    num_indices,
    num_bags,
    num_offsets,
    bag_length,  # ids a bag, where there are no offsets
    padding_idx,  # -1: none
    search_steps,  # bits of num_bags
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
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
            # A program within one bag adds once, or long bags would queue at one address.
            tl.atomic_add(sizes_ptr + lowest, tl.sum(counted.to(tl.int32), 0), sem="relaxed")
        else:
            tl.atomic_add(sizes_ptr + bag, 1, mask=counted, sem="relaxed")


# Program i owns positions [i * BLOCK_N, ...): the inner product of each one's row and its bag's gradient.
@triton.jit
def bag_sample_weights_kernel(
    grad_output_ptr,  # [num_bags, D], any strides
    weight_ptr,  # [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    bag_of_ptr,  # [num_indices]: the bag of each position, -1: none
    grad_ptr,  # [num_indices]
    num_indices,
    num_embeddings,
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
    read = in_range & (bag >= 0) & (index >= 0) & (index < num_embeddings)
    read = read & (index != padding_idx)
    total = tl.zeros([BLOCK_N, BLOCK_D], acc_dtype)
    for first in range(0, D, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
        in_row = read[:, None] & (d < D)
        row = tl.load(
            weight_ptr + (index * weight_row_stride * VEC)[:, None] + d * weight_col_stride,
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
