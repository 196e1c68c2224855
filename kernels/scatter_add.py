"""Atomic gradient: grad_weight[indices[n]] += grad_output[n], or [bag_of[n]] for bags; in the accumulation dtype."""

import triton
import triton.language as tl

from .rounding import divide


# grid:  (cdiv(num_indices * D / VEC, BLOCK),)
# tile:  BLOCK vectors of VEC elements
# owner: program i: vectors [i * BLOCK, ...) of the flattened [num_indices, D], across row boundaries
# why:   neighbouring lanes add to neighbouring vectors, so a warp's atomics fall on whole sectors
@triton.jit
def scatter_add_kernel(
    grad_output_ptr,  # [*, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    bag_of_ptr,  # [num_indices]: each position's bag, -1: in no bag; None: no bags, position n reads row n
    per_sample_weights_ptr,  # grad_output's dtype, [num_indices]; None: all 1
    sizes_ptr,  # int32 [num_bags]: the divisors of means; None: all 1
    grad_weight_ptr,  # fp32 or fp64, [num_embeddings, D], contiguous, zero on entry
    num_indices,
    num_embeddings,
    padding_idx,  # -1: none
    grad_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    grad_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread adds with one instruction; divides D
    BLOCK: tl.constexpr,
):
    VECTORS: tl.constexpr = D // VEC
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_n = start // VECTORS
    flat_offset = (start - first_n * VECTORS).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    n = first_n + flat_offset // VECTORS
    in_range = n < num_indices
    index = tl.load(indices_ptr + n, mask=in_range, other=0).to(tl.int64)
    added = in_range & (index >= 0) & (index < num_embeddings) & (index != padding_idx)

    row = n
    if bag_of_ptr is not None:
        row = tl.load(bag_of_ptr + n, mask=added, other=0).to(tl.int64)
        added = added & (row >= 0)

    d = ((flat_offset % VECTORS) * VEC)[:, None] + tl.arange(0, VEC)[None, :]  # [BLOCK, VEC]
    grad = tl.load(
        grad_output_ptr + (row * grad_row_stride * VEC)[:, None] + d.to(tl.int64) * grad_col_stride,
        mask=added[:, None],
        other=0,
    )
    if per_sample_weights_ptr is not None:
        grad *= tl.load(per_sample_weights_ptr + n, mask=added, other=0)[:, None]
    if sizes_ptr is not None:
        size = tl.load(sizes_ptr + row, mask=added, other=1).to(grad.dtype)
        grad *= divide(tl.full([BLOCK], 1, grad.dtype), size)[:, None]
    # Relaxed: nothing in this launch reads the sums.
    tl.atomic_add(
        grad_weight_ptr + (index * D)[:, None] + d,
        grad.to(grad_weight_ptr.dtype.element_ty),
        mask=added[:, None],
        sem="relaxed",
    )
