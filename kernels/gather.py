"""Row gather: output[n] = weight[indices[n]], copied as raw bits.

The host views every dtype as words of 1, 2, 4 or 8 bytes, the widest that the rows' alignment allows: one
kernel serves all dtypes. Rows aligned to 16 bytes are read as VEC = 2 words of 8.
"""

import triton
import triton.language as tl

from .bounds import local_row, record_out_of_range
from .flat_chunk import chunk_start, of_rows, step_vectors, window_rows


@triton.jit
def load_indices(
    indices_ptr, n, in_range, num_embeddings, zero_idx, first_row=None, table_rows=None
):
    """The ids at positions n, int64; a mask of rows to copy; a mask of ids out of range."""
    index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
    # Without its sign a negative number is larger than any number of rows.
    in_table = local_row(index, first_row).to(tl.uint64) < num_embeddings
    copied = in_range & in_table & (index != zero_idx)
    if table_rows is not None:
        in_table = index.to(tl.uint64) < table_rows
    return index, copied, in_range & ~in_table


@triton.jit
def copy_rows(
    weight_ptr,
    rows,  # windows of row numbers, negative: the row is zeroed; see flat_chunk.py
    row_stride,  # in units of VEC words
    col_stride,
    output_ptr,
    first_vector,  # as of chunk_start
    num_rows,  # of the output, from the chunk's first on
    D: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy rows to the program's vectors of the flattened output; all loads are issued before the first store."""
    VECTORS: tl.constexpr = D // VEC
    j = tl.arange(0, VEC)[None, :]
    words = ()
    for step in tl.static_range(BLOCK // 32):
        k, vector = step_vectors(first_vector, step, VECTORS, BLOCK)
        row = of_rows(rows, k, step, VECTORS, BLOCK)  # [32]
        d = (vector * VEC)[:, None] + j  # [32, VEC]
        word = tl.load(
            weight_ptr
            + (row.to(tl.int64) * row_stride * VEC)[:, None]
            + d.to(tl.int64) * col_stride,
            mask=(row >= 0)[:, None],
            other=0,
        )
        words += (word,)
    output_ptr += tl.program_id(0).to(tl.int64) * (BLOCK * VEC)
    output_ptr += (tl.arange(0, 32) * VEC)[:, None] + j
    for step in tl.static_range(BLOCK // 32):
        k, _ = step_vectors(first_vector, step, VECTORS, BLOCK)
        tl.store(output_ptr + 32 * step * VEC, words[step], mask=(k < num_rows)[:, None])


# grid:  (cdiv(num_indices, BLOCK_N), cdiv(D, BLOCK_D))
# tile:  BLOCK_D words, BLOCK_N times
# owner: program (i, j): rows [i * BLOCK_N, ...) of the output, words [j * BLOCK_D, ...) of each
# why:   ids are numbers of the whole program: a row costs no lane an instruction but its load and its store
@triton.jit(do_not_specialize=["first_row"])  # one binary for all ranks
def gather_rows_kernel(
    weight_ptr,  # words, [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    output_ptr,  # words, [num_indices, D], contiguous
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_embeddings,
    first_row,  # of this shard in a table of table_rows rows, which has the ids; None: no shard
    table_rows,  # None: no shard
    zero_idx,  # this id's rows are zeroed; -1: none
    weight_row_stride,  # in units of VEC words, so that the compiler sees the alignment; None: D / VEC
    weight_col_stride,  # in words
    D: tl.constexpr,  # words per row
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_row = d < D
    if D % BLOCK_D == 0:
        in_row = d >= 0
    row_stride = D // VEC if weight_row_stride is None else weight_row_stride
    indices = ()
    words = ()
    bad = ()
    for r in tl.static_range(BLOCK_N):
        n = first_n + r
        index, copied, out_of_range = load_indices(
            indices_ptr, n, n < num_indices, num_embeddings, zero_idx, first_row, table_rows
        )
        row = local_row(index, first_row)
        word = tl.load(
            weight_ptr + row * row_stride * VEC + d.to(tl.int64) * weight_col_stride,
            mask=copied & in_row,
            other=0,
        )  # [BLOCK_D]
        indices += (index,)
        words += (word,)
        bad += (out_of_range,)
    for r in tl.static_range(BLOCK_N):
        n = first_n + r
        tl.store(output_ptr + n * D + d, words[r], mask=(n < num_indices) & in_row)
    if record_ptr is not None:
        for r in tl.static_range(BLOCK_N):
            if bad[r]:
                # A branch, not a mask: after a masked exchange several warps would read its result from shared memory
                # that none has written.
                if tl.program_id(1) == 0:
                    record_out_of_range(
                        record_ptr,
                        flag_ptr,
                        bad[r],
                        first_n + r,
                        indices[r],
                        num_embeddings if table_rows is None else table_rows,
                    )


# grid:  (cdiv(num_indices * D / VEC, BLOCK),)
# tile:  32 vectors of VEC words, BLOCK / 32 times; one warp
# owner: program i: vectors [i * BLOCK, ...) of the flattened output, across row boundaries
# why:   no lane idles when a row is shorter than a warp, or its length no power of two; loads and stores have the same
#        lanes, so nothing is exchanged but ids
@triton.jit(do_not_specialize=["first_row"])  # one binary for all ranks
def gather_flat_kernel(
    weight_ptr,  # words, [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    output_ptr,  # words, [num_indices, D], contiguous
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_embeddings,
    first_row,  # of this shard in a table of table_rows rows, which has the ids; None: no shard
    table_rows,  # None: no shard
    zero_idx,  # this id's rows are zeroed; -1: none
    weight_row_stride,  # in units of VEC words; None: D / VEC
    weight_col_stride,  # in words
    D: tl.constexpr,  # words per row
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    VECTORS: tl.constexpr = D // VEC
    # As in of_rows.
    LATEST: tl.constexpr = 0 if BLOCK % VECTORS == 0 else VECTORS - (VECTORS & -VECTORS)
    WINDOWS: tl.constexpr = (LATEST + BLOCK - 1) // VECTORS // 32 + 1
    group, chunk_n, first_vector = chunk_start(VECTORS, BLOCK)
    # Of the wider dtype. A sum has one even where Triton takes a number that is 1 for a constant.
    first_n = group.to((group * 0 + num_indices).dtype) * BLOCK
    num_rows = num_indices - first_n
    # A row number takes one shuffle, or two from 2**31 rows on.
    row_dtype: tl.constexpr = (group * 0 + num_embeddings).dtype

    rows = ()
    for window in tl.static_range(WINDOWS):
        k, touched = window_rows(first_vector, window, VECTORS, BLOCK)
        n = chunk_n + k
        index, copied, out_of_range = load_indices(
            indices_ptr + first_n,
            n,
            touched & (n < num_rows),
            num_embeddings,
            zero_idx,
            first_row,
            table_rows,
        )
        row = local_row(index, first_row)
        rows += (tl.where(copied, row, -1).to(row_dtype),)
        if window == 0:
            bad = out_of_range
            bad_n = n
            bad_index = index
        else:
            bad_n = tl.where(bad, bad_n, n)
            bad_index = tl.where(bad, bad_index, index)
            bad = bad | out_of_range

    copy_rows(
        weight_ptr,
        rows,
        D // VEC if weight_row_stride is None else weight_row_stride,
        weight_col_stride,
        output_ptr,
        first_vector,
        num_rows - chunk_n,
        D,
        VEC,
        BLOCK,
    )
    if record_ptr is not None:
        if tl.max(bad.to(tl.int32), 0) > 0:
            record_out_of_range(
                record_ptr,
                flag_ptr,
                bad,
                first_n + bad_n,
                bad_index,
                num_embeddings if table_rows is None else table_rows,
            )
