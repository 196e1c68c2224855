"""Atomic gradient: grad_weight[indices[n]] += grad_output[n], or [bag_of[n]] for bags; in the accumulation dtype."""

import triton
import triton.language as tl

from .bounds import local_row
from .flat_chunk import chunk_start, of_rows, step_vectors, window_rows
from .rounding import divide


# grid:  (cdiv(num_indices * D / VEC, BLOCK),)
# tile:  32 vectors of VEC elements, BLOCK / 32 times; one warp
# owner: program i: vectors [i * BLOCK, ...) of the flattened [num_indices, D], across row boundaries
# why:   neighbouring lanes add to neighbouring vectors, so a warp's atomics fall on whole sectors
@triton.jit(do_not_specialize=["first_row"])  # one binary for all ranks
def scatter_add_kernel(
    grad_output_ptr,  # [*, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    bag_of_ptr,  # [num_indices]: each position's bag, -1: in no bag; None: no bags, position n reads row n
    per_sample_weights_ptr,  # grad_output's dtype, [num_indices]; None: all 1
    sizes_ptr,  # int32 [num_bags]: the divisors of means; None: all 1. Not with per_sample_weights
    grad_weight_ptr,  # fp32 or fp64, [num_embeddings, D], any strides
    num_indices,
    num_embeddings,
    first_row,  # of this shard in a larger table, which has the ids; None: no shard
    padding_idx,  # -1: none
    grad_row_stride,  # in units of VEC elements, so that the compiler sees the alignment; None: D / VEC
    grad_col_stride,  # in elements
    grad_weight_row_stride,  # as grad_row_stride
    grad_weight_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread adds with one instruction; divides D
    BLOCK: tl.constexpr,
):
    acc_dtype: tl.constexpr = grad_weight_ptr.dtype.element_ty
    VECTORS: tl.constexpr = D // VEC
    # As in of_rows.
    LATEST: tl.constexpr = 0 if BLOCK % VECTORS == 0 else VECTORS - (VECTORS & -VECTORS)
    WINDOWS: tl.constexpr = (LATEST + BLOCK - 1) // VECTORS // 32 + 1
    group, chunk_n, first_vector = chunk_start(VECTORS, BLOCK)
    # Of the wider dtype. A sum has one even where Triton takes a number that is 1 for a constant.
    first_n = group.to((group * 0 + num_indices).dtype) * BLOCK
    # A row number takes one shuffle, or two from 2**31 rows on.
    row_dtype: tl.constexpr = (group * 0 + num_embeddings).dtype

    rows = ()
    bags = ()
    scales = ()
    for window in tl.static_range(WINDOWS):
        k, touched = window_rows(first_vector, window, VECTORS, BLOCK)
        n = chunk_n + k
        in_range = touched & (n < num_indices - first_n)
        index = tl.load(indices_ptr + first_n + n, mask=in_range, other=0).to(tl.int64)
        row = local_row(index, first_row)
        # Without its sign a negative number is larger than any number of rows.
        added = in_range & (row.to(tl.uint64) < num_embeddings) & (index != padding_idx)
        if bag_of_ptr is not None:
            bag = tl.load(bag_of_ptr + first_n + n, mask=added, other=-1)
            added = added & (bag >= 0)
            bags += (bag,)
        if per_sample_weights_ptr is not None:
            scale = tl.load(per_sample_weights_ptr + first_n + n, mask=added, other=0)
            scales += (scale.to(acc_dtype),)
        elif sizes_ptr is not None:
            size = tl.load(sizes_ptr + bag, mask=added, other=1).to(acc_dtype)
            scales += (divide(tl.full(size.shape, 1, acc_dtype), size),)
        rows += (tl.where(added, row, -1).to(row_dtype),)

    row_stride = D // VEC if grad_row_stride is None else grad_row_stride
    target_stride = D // VEC if grad_weight_row_stride is None else grad_weight_row_stride
    j = tl.arange(0, VEC)[None, :]
    targets = ()
    grads = ()
    for step in tl.static_range(BLOCK // 32):
        k, vector = step_vectors(first_vector, step, VECTORS, BLOCK)
        row = of_rows(rows, k, step, VECTORS, BLOCK)  # [32]
        grad_row = first_n.to(tl.int64) + chunk_n + k
        if bag_of_ptr is not None:
            grad_row = of_rows(bags, k, step, VECTORS, BLOCK).to(tl.int64)
        d = (vector * VEC)[:, None] + j  # [32, VEC]
        grad = tl.load(
            grad_output_ptr
            + (grad_row * row_stride * VEC)[:, None]
            + d.to(tl.int64) * grad_col_stride,
            mask=(row >= 0)[:, None],
            other=0,
        ).to(acc_dtype)
        if per_sample_weights_ptr is not None or sizes_ptr is not None:
            grad *= of_rows(scales, k, step, VECTORS, BLOCK)[:, None]
        targets += (row,)
        grads += (grad,)
    for step in tl.static_range(BLOCK // 32):
        _, vector = step_vectors(first_vector, step, VECTORS, BLOCK)
        row = targets[step]
        d = (vector * VEC)[:, None] + j
        # Relaxed: nothing in this launch reads the sums.
        tl.atomic_add(
            grad_weight_ptr
            + (row.to(tl.int64) * target_stride * VEC)[:, None]
            + d.to(tl.int64) * grad_weight_col_stride,
            grads[step],
            mask=(row >= 0)[:, None],
            sem="relaxed",
        )
