"""Rows of a table of 8-bit or 4-bit integers, as Keras quantizes one: only the rows that ids name are dequantized.

A group of columns of a row shares a scale: output = value / scale, or (value - zero) * scale where there are zeros.
Two 4-bit columns share a byte, the even one in its lower half. Ids are those of take_rows_kernel.
"""

import triton
import triton.language as tl

from .bounds import record_out_of_range
from .rounding import divide
from .take import flat_vectors, load_wrapped_indices


@triton.jit
def signed_half(byte):
    """The lower four bits, from -8 to 7."""
    return ((byte & 15) ^ 8) - 8


@triton.jit
def load_columns(
    values_ptr, row, taken, vector, D: tl.constexpr, VEC: tl.constexpr, BITS: tl.constexpr
):
    """VEC columns of each row [BLOCK], from vector * VEC on -> int8 [BLOCK, VEC]."""
    ROW_BYTES: tl.constexpr = D if BITS == 8 else (D + 1) // 2
    if VEC * BITS >= 8:
        # Whole bytes, adjacent.
        BYTES: tl.constexpr = VEC * BITS // 8
        place = (vector * BYTES)[:, None] + tl.arange(0, BYTES)[None, :]  # [BLOCK, BYTES]
        byte = tl.load(values_ptr + row[:, None] * ROW_BYTES + place, mask=taken[:, None], other=0)
        if BITS == 8:
            columns = byte
        else:
            columns = tl.interleave(signed_half(byte), signed_half(byte >> 4))
    else:
        byte = tl.load(values_ptr + row * ROW_BYTES + vector // 2, mask=taken, other=0)
        columns = signed_half(byte >> (vector % 2 * 4).to(tl.int8))[:, None]
    return columns


# Program i owns BLOCK consecutive vectors of the output, whatever rows they lie in.
@triton.jit
def dequantize_rows_kernel(
    values_ptr,  # int8, [num_embeddings, D], or [num_embeddings, (D + 1) / 2] of 4 bits; contiguous
    scale_ptr,  # any float dtype, [num_embeddings, groups], contiguous
    zero_ptr,  # int8, of scale's shape, or None: no zeros
    indices_ptr,  # any integer or float dtype, [num_indices], contiguous
    output_ptr,  # any float dtype, [num_indices, D], contiguous
    record_ptr,  # int64 [4], or None: do not record
    flag_ptr,  # int32 [1], pinned host memory, or None
    num_indices,
    num_embeddings,
    D: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale
    BITS: tl.constexpr,
    VEC: tl.constexpr,  # divides D and GROUP
    BLOCK: tl.constexpr,
):
    n, vector = flat_vectors(D // VEC, BLOCK)
    in_range = n < num_indices
    index, row, taken, out_of_range = load_wrapped_indices(indices_ptr, n, in_range, num_embeddings)
    acc_dtype: tl.constexpr = tl.float64 if scale_ptr.dtype.element_ty == tl.float64 else tl.float32
    values = load_columns(values_ptr, row, taken, vector, D, VEC, BITS).to(acc_dtype)
    group = row * ((D + GROUP - 1) // GROUP) + vector * VEC // GROUP  # [BLOCK]
    scale = tl.load(scale_ptr + group, mask=taken, other=1).to(acc_dtype)[:, None]
    if zero_ptr is None:
        values = divide(values, tl.broadcast_to(scale, (BLOCK, VEC)))
    else:
        zero = tl.load(zero_ptr + group, mask=taken, other=0).to(acc_dtype)
        values = (values - zero[:, None]) * scale
    d = (vector * VEC)[:, None] + tl.arange(0, VEC)[None, :]  # [BLOCK, VEC]
    tl.store(
        output_ptr + n[:, None] * D + d,
        values.to(output_ptr.dtype.element_ty),
        mask=in_range[:, None],
    )
    if record_ptr is not None:
        record_out_of_range(
            record_ptr, flag_ptr, out_of_range & (vector == 0), n, index, -num_embeddings
        )
