"""Take from a table that Keras quantized to 8 or 4 bits: only the rows that are looked up are dequantized.

GROUP columns of a row share a scale and, optionally, a zero point: output = value / scale, or
(value - zero) * scale. Two 4-bit columns share a byte, the even one in the low nibble. Ids as in take.py.

FUSED: each group's bytes are its codes, unsigned, its scale and its offset; output = code * scale + offset, a product
without rounding. Ids as in gather.py: negative ones are out of range. See gpu_embed/fused_rows.py.
"""

import triton
import triton.language as tl

from .bounds import record_out_of_range
from .rounding import divide
from .take import flat_vectors, load_wrapped_indices


@triton.jit
def load_indices(indices_ptr, n, in_range, num_embeddings):
    """As load_wrapped_indices, of integers that are not wrapped."""
    index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
    in_table = (index >= 0) & (index < num_embeddings)
    return index, index, in_range & in_table, in_range & ~in_table


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


@triton.jit
def load_codes(
    values_ptr,
    row_group,
    taken,
    vector,
    GROUP: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    VEC: tl.constexpr,
    BITS: tl.constexpr,
):
    """Codes of each vector of a group of fused rows -> uint8 [BLOCK, VEC]. row_group, taken, vector: [BLOCK]."""
    start = row_group * GROUP_BYTES
    vector = vector % (GROUP // VEC)  # in the group
    if VEC * BITS >= 8:
        BYTES: tl.constexpr = VEC * BITS // 8
        offset = (vector * BYTES)[:, None] + tl.arange(0, BYTES)[None, :]  # [BLOCK, BYTES]
        byte = tl.load(values_ptr + start[:, None] + offset, mask=taken[:, None], other=0)
        codes = byte if BITS == 8 else tl.interleave(byte & 15, byte >> 4)
    else:
        byte = tl.load(values_ptr + start + vector // 2, mask=taken, other=0)
        codes = (byte >> (vector % 2 * 4).to(tl.uint8) & 15)[:, None]
    return codes


# grid:  (cdiv(num_indices * D / VEC, BLOCK),)
# tile:  BLOCK vectors of VEC elements
# owner: program i: vectors [i * BLOCK, ...) of the flattened output, across row boundaries
# why:   as take_rows_kernel
@triton.jit
def dequantize_rows_kernel(
    values_ptr,  # int8, [num_embeddings, D], or [num_embeddings, (D + 1) / 2] if 4-bit; contiguous
    scale_ptr,  # any float dtype, [num_embeddings, groups], contiguous; FUSED: the memory of the values
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
    FUSED: tl.constexpr,  # values: uint8, [num_embeddings, groups, bytes of a group]
    VEC: tl.constexpr,  # divides D and GROUP
    BLOCK: tl.constexpr,
):
    n, vector = flat_vectors(D // VEC, BLOCK)
    in_range = n < num_indices
    if FUSED:
        index, row, taken, out_of_range = load_indices(indices_ptr, n, in_range, num_embeddings)
    else:
        index, row, taken, out_of_range = load_wrapped_indices(
            indices_ptr, n, in_range, num_embeddings
        )
    acc_dtype: tl.constexpr = tl.float64 if scale_ptr.dtype.element_ty == tl.float64 else tl.float32
    if FUSED:
        group = row * ((D + GROUP - 1) // GROUP) + vector * VEC // GROUP  # [BLOCK]
        ITEM: tl.constexpr = scale_ptr.dtype.element_ty.primitive_bitwidth // 8
        CODE_BYTES: tl.constexpr = GROUP * BITS // 8
        GROUP_BYTES: tl.constexpr = CODE_BYTES + 2 * ITEM
        codes = load_codes(values_ptr, group, taken, vector, GROUP, GROUP_BYTES, VEC, BITS)
        place = group * (GROUP_BYTES // ITEM) + CODE_BYTES // ITEM
        scale = tl.load(scale_ptr + place, mask=taken, other=0).to(acc_dtype)[:, None]
        offset = tl.load(scale_ptr + place + 1, mask=taken, other=0).to(acc_dtype)[:, None]
        values = codes.to(acc_dtype) * scale + offset
    else:
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
        limit = num_embeddings if FUSED else -num_embeddings
        record_out_of_range(record_ptr, flag_ptr, out_of_range & (vector == 0), n, index, limit)
