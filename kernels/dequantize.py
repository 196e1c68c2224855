"""Take from a table that Keras quantized to 8 or 4 bits: only the rows that are looked up are dequantized.

GROUP columns of a row share a scale and, optionally, a zero point: output = value / scale, or
(value - zero) * scale. Two 4-bit columns share a byte, the even one in the low nibble. Ids as in take.py.
"""

import triton
import triton.language as tl

from .bounds import record_out_of_range
from .rounding import divide
from .take import flat_vectors, load_wrapped_indices


@triton.jit
def low_nibble(byte):
    """The low nibble, sign-extended."""
    return ((byte & 15) ^ 8) - 8


@triton.jit
def load_columns(
    values_ptr, row, taken, vector, D: tl.constexpr, VEC: tl.constexpr, BITS: tl.constexpr
):
    """Columns [vector * VEC, ...) of each row -> int8 [BLOCK, VEC]. row, taken, vector: [BLOCK]."""
    ROW_BYTES: tl.constexpr = D if BITS == 8 else (D + 1) // 2
    if VEC * BITS >= 8:
        # Whole, adjacent bytes: one vector load.
        BYTES: tl.constexpr = VEC * BITS // 8
        offset = (vector * BYTES)[:, None] + tl.arange(0, BYTES)[None, :]  # [BLOCK, BYTES]
        byte = tl.load(values_ptr + row[:, None] * ROW_BYTES + offset, mask=taken[:, None], other=0)
        if BITS == 8:
            columns = byte
        else:
            columns = tl.interleave(low_nibble(byte), low_nibble(byte >> 4))
    else:
        byte = tl.load(values_ptr + row * ROW_BYTES + vector // 2, mask=taken, other=0)
        columns = low_nibble(byte >> (vector % 2 * 4).to(tl.int8))[:, None]
    return columns


# grid:  (cdiv(num_indices * D / VEC, BLOCK),)
# tile:  BLOCK vectors of VEC elements
# owner: program i: vectors [i * BLOCK, ...) of the flattened output, across row boundaries
# why:   as take_rows_kernel
@triton.jit
def dequantize_rows_kernel(
    values_ptr,  # int8, [num_embeddings, D], or [num_embeddings, (D + 1) / 2] if 4-bit; contiguous
    scale_ptr,  # any float dtype, [num_embeddings, groups], contiguous
    zero_ptr,  # int8, scale's shape; None: no zero points
    indices_ptr,  # any integer or float dtype, [num_indices], contiguous
    output_ptr,  # any float dtype, [num_indices, D], contiguous
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
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
