"""Rows in the way of Keras's take: ids of any real dtype, negative ones counted from the end, rows converted.

output[n] = weight[row of indices[n]], rounded to the output's dtype: in one launch what takes a framework a cast of
the ids, a comparison, an addition, a selection, a gather and a cast of the rows.
"""

import triton
import triton.language as tl

from .bounds import record_out_of_range


@triton.jit
def flat_vectors(VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """Which row of the output, and which of its VECTORS vectors, each lane of this program owns."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_n = start // VECTORS
    # The 64-bit division is done once a program; lanes divide 32-bit numbers by a constant.
    lane = (start - first_n * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    return first_n + lane // VECTORS, lane % VECTORS


@triton.jit
def load_wrapped_indices(indices_ptr, n, in_range, num_embeddings):
    """Ids at positions n cut to int64, the rows that they mean, and which of these there are and are not."""
    number = tl.load(indices_ptr + n, mask=in_range, other=0)
    index = number.to(tl.int64)
    row = tl.where(index < 0, index + num_embeddings, index)
    # NaN is no row, whatever integer it becomes.
    in_table = (row >= 0) & (row < num_embeddings) & (number == number)
    return index, row, in_range & in_table, in_range & ~in_table


# Program i owns BLOCK consecutive vectors of the output, whatever rows they lie in.
@triton.jit
def take_rows_kernel(
    weight_ptr,  # any float dtype, [num_embeddings, D], any strides
    indices_ptr,  # any integer or float dtype, [num_indices], contiguous
    output_ptr,  # any float dtype, [num_indices, D], contiguous
    record_ptr,  # int64 [4], or None: do not record
    flag_ptr,  # int32 [1], pinned host memory, or None
    num_indices,
    num_embeddings,
    weight_row_stride,  # in units of VEC items, so that the compiler sees the alignment
    weight_col_stride,
    D: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, vector = flat_vectors(D // VEC, BLOCK)
    in_range = n < num_indices
    index, row, taken, out_of_range = load_wrapped_indices(indices_ptr, n, in_range, num_embeddings)
    d = (vector * VEC)[:, None] + tl.arange(0, VEC)[None, :]  # [BLOCK, VEC]
    values = tl.load(
        weight_ptr + (row * weight_row_stride * VEC)[:, None] + d.to(tl.int64) * weight_col_stride,
        mask=taken[:, None],
        other=0,
    )
    tl.store(
        output_ptr + n[:, None] * D + d,
        values.to(output_ptr.dtype.element_ty),
        mask=in_range[:, None],
    )
    if record_ptr is not None:
        record_out_of_range(
            record_ptr, flag_ptr, out_of_range & (vector == 0), n, index, -num_embeddings
        )
