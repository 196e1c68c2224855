"""Row gather: output[n] = weight[indices[n]], copied as raw bits.

The host views every dtype as words of 1, 2, 4 or 8 bytes, the widest that the rows' alignment allows: one
kernel serves all dtypes. Rows aligned to 16 bytes are read as VEC = 2 words of 8.
"""

import triton
import triton.language as tl

from .bounds import record_out_of_range


@triton.jit
def load_indices(indices_ptr, n, in_range, num_embeddings, zero_idx):
    """The ids at positions n, int64; a mask of rows to copy; a mask of ids out of range."""
    index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
    in_table = (index >= 0) & (index < num_embeddings)
    return index, in_range & in_table & (index != zero_idx), in_range & ~in_table


# grid:  (cdiv(num_indices, BLOCK_N), cdiv(D, BLOCK_D))
# tile:  BLOCK_N rows by BLOCK_D words
# owner: program (i, j): rows [i * BLOCK_N, ...) of the output, words [j * BLOCK_D, ...) of each
# why:   a row that fills its tiles needs no division to find its id
@triton.jit
def gather_rows_kernel(
    weight_ptr,  # words, [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    output_ptr,  # words, [num_indices, D], contiguous
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_embeddings,
    zero_idx,  # this id's rows are zeroed; -1: none
    weight_row_stride,  # in units of VEC words, so that the compiler sees the alignment
    weight_col_stride,  # in words
    D: tl.constexpr,  # words per row
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_range = n < num_indices
    index, copied, out_of_range = load_indices(indices_ptr, n, in_range, num_embeddings, zero_idx)

    row = index * weight_row_stride * VEC
    words = tl.load(
        weight_ptr + row[:, None] + (d.to(tl.int64) * weight_col_stride)[None, :],
        mask=copied[:, None] & (d < D)[None, :],
        other=0,
    )  # [BLOCK_N, BLOCK_D]
    tl.store(
        output_ptr + n[:, None] * D + d[None, :], words, mask=in_range[:, None] & (d < D)[None, :]
    )
    if record_ptr is not None:
        first_columns = tl.program_id(1) == 0
        record_out_of_range(
            record_ptr, flag_ptr, out_of_range & first_columns, n, index, num_embeddings
        )


# grid:  (cdiv(num_indices * D / VEC, BLOCK),)
# tile:  BLOCK vectors of VEC words
# owner: program i: vectors [i * BLOCK, ...) of the flattened output, across row boundaries
# why:   no lane idles when a row is shorter than a warp, or its length no power of two
@triton.jit
def gather_flat_kernel(
    weight_ptr,  # words, [num_embeddings, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    output_ptr,  # words, [num_indices, D], contiguous
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_embeddings,
    zero_idx,  # this id's rows are zeroed; -1: none
    weight_row_stride,  # in units of VEC words
    weight_col_stride,  # in words
    D: tl.constexpr,  # words per row
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    VECTORS: tl.constexpr = D // VEC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_n = start // VECTORS
    # One 64-bit division per program; threads divide in 32 bits, by a constant.
    flat_offset = (start - first_n * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    n = first_n + flat_offset // VECTORS
    vector = flat_offset % VECTORS
    in_range = n < num_indices
    index, copied, out_of_range = load_indices(indices_ptr, n, in_range, num_embeddings, zero_idx)

    row = index * weight_row_stride * VEC
    d = (vector * VEC)[:, None] + tl.arange(0, VEC)[None, :]  # [BLOCK, VEC]
    words = tl.load(
        weight_ptr + row[:, None] + d.to(tl.int64) * weight_col_stride,
        mask=copied[:, None],
        other=0,
    )
    out = ((start + tl.arange(0, BLOCK)) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    tl.store(output_ptr + out, words, mask=in_range[:, None])
    if record_ptr is not None:
        record_out_of_range(
            record_ptr, flag_ptr, out_of_range & (vector == 0), n, index, num_embeddings
        )
