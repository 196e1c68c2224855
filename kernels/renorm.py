"""max_norm: scale every looked-up row whose p-norm exceeds max_norm, in place."""

import triton
import triton.language as tl

from .rounding import divide, square_root
from .sort_keys import load_key


@triton.jit
def largest(x):
    """The maximum of each row of [BLOCK_N, BLOCK_D]; NaN where a row holds one, unlike tl.max."""
    has_nan = tl.max((x != x).to(tl.int32), 1) > 0
    return tl.where(has_nan, float("nan"), tl.max(x, 1))


@triton.jit
def add_power(total, magnitude, norm_type: tl.constexpr, NORM: tl.constexpr):
    """Accumulate one block of columns into the norm, before the root."""
    if NORM == "inf":
        total = tl.maximum(total, largest(magnitude), propagate_nan=tl.PropagateNan.ALL)
    elif NORM == "-inf":
        total = tl.minimum(total, -largest(-magnitude), propagate_nan=tl.PropagateNan.ALL)
    elif NORM == "0":
        total += tl.sum((magnitude != 0).to(total.dtype), 1)
    elif NORM == "1":
        total += tl.sum(magnitude, 1)
    elif NORM == "2":
        total += tl.sum(magnitude * magnitude, 1)
    else:
        power = tl.full([1, 1], norm_type, total.dtype)
        total += tl.sum(tl.exp2(tl.log2(magnitude) * power), 1)
    return total


# grid:  (cdiv(num_indices, BLOCK_N),)
# tile:  BLOCK_N keys by BLOCK_D columns, a loop over D
# owner: program i: keys [i * BLOCK_N, ...); the first key of a run of equal ones owns its row
# why:   one owner per row, so the update in place needs no atomics
@triton.jit
def renorm_kernel(
    weight_ptr,  # [num_embeddings, D], any strides
    keys_ptr,  # [num_indices], sorted row numbers; from num_embeddings on: sentinels
    num_indices,
    num_embeddings,
    last_valid_key,  # a key behind it is that of an id out of range
    weight_row_stride,  # in elements
    weight_col_stride,  # in elements
    max_norm: tl.float64,
    norm_type: tl.constexpr,  # for NORM "p"; else 0
    D: tl.constexpr,
    NORM: tl.constexpr,  # "inf", "-inf", "0", "1", "2" or "p"
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc_dtype: tl.constexpr = (
        tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    )
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    key = load_key(keys_ptr, n, n < num_indices)
    before = load_key(keys_ptr, n - 1, (n > 0) & (n < num_indices))
    # Ids out of range sort last. If there is one, the call leaves the whole table unchanged.
    all_valid = load_key(keys_ptr, num_indices - 1, True) <= last_valid_key
    owns = (n < num_indices) & ((n == 0) | (key != before)) & (key < num_embeddings) & all_valid
    row_ptr = weight_ptr + (key * weight_row_stride)[:, None]

    total = tl.zeros([BLOCK_N], acc_dtype)
    if NORM == "-inf":
        total += float("inf")
    for first in range(0, D, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        in_row = owns[:, None] & (d < D)
        value = tl.load(row_ptr + d * weight_col_stride, mask=in_row, other=0).to(acc_dtype)
        magnitude = tl.abs(value)
        if NORM == "-inf" or NORM == "p":
            # Columns past the row's end get the neutral element: inf for a minimum or a negative power, else 0.
            neutral = float("inf") if NORM == "-inf" or norm_type < 0 else 0.0
            magnitude = tl.where(in_row, magnitude, neutral)
        total = add_power(total, magnitude, norm_type, NORM)
    norm = total
    if NORM == "2":
        norm = square_root(total)
    elif NORM == "p":
        norm = tl.exp2(tl.log2(total) / tl.full([1], norm_type, acc_dtype))

    limit = tl.full([BLOCK_N], max_norm, acc_dtype)
    scaled = owns & (norm > limit)
    scale = divide(limit, norm + tl.full([1], 1e-7, acc_dtype))
    for first in range(0, D, BLOCK_D):
        d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        in_row = scaled[:, None] & (d < D)
        value = tl.load(row_ptr + d * weight_col_stride, mask=in_row, other=0).to(acc_dtype)
        tl.store(
            row_ptr + d * weight_col_stride,
            (value * scale[:, None]).to(weight_ptr.dtype.element_ty),
            mask=in_row,
        )
