"""Take, Keras's lookup: ids of any real dtype, negative ids wrapped, rows converted to the output's dtype.

One launch does what costs a framework six: cast the ids, compare, add, select, gather, cast the rows.
"""

import triton
import triton.language as tl

from .bounds import record_out_of_range


@triton.jit
def flat_vectors(VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """Each element's row of the output, and its vector in that row of VECTORS; programs ignore row boundaries."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_n = start // VECTORS
    # One 64-bit division per program; threads divide in 32 bits, by a constant.
    flat_offset = (start - first_n * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    return first_n + flat_offset // VECTORS, flat_offset % VECTORS


@triton.jit
def load_wrapped_indices(indices_ptr, n, in_range, num_embeddings):
    """The ids at positions n truncated to int64; their rows; a mask of rows to read; a mask of ids out of range."""
    number = tl.load(indices_ptr + n, mask=in_range, other=0)
    index = number.to(tl.int64)
    row = tl.where(index < 0, index + num_embeddings, index)
    # NaN casts to an undefined integer: it is out of range.
    in_table = (row >= 0) & (row < num_embeddings) & (number == number)
    return index, row, in_range & in_table, in_range & ~in_table


# grid:  (cdiv(num_indices * D / VEC, BLOCK),)
# tile:  BLOCK vectors of VEC elements
# owner: program i: vectors [i * BLOCK, ...) of the flattened output, across row boundaries
# why:   no lane idles when a row is shorter than a warp, or its length no power of two
@triton.jit
def take_rows_kernel(
    weight_ptr,  # any float dtype, [num_embeddings, D], any strides
    indices_ptr,  # any integer or float dtype, [num_indices], contiguous
    output_ptr,  # any float dtype, [num_indices, D], contiguous
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_embeddings,
    weight_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    weight_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction; divides D
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
