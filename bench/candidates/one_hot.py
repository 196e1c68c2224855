"""One-hot gradient of tiny tables: grad_weight = one_hot(indices)^T @ grad_output, on tensor cores.

Products with 0 and 1 are exact, and the sums are fp32. The ids are cut into splits, whose sums are added in a
fixed order and rounded once: the result is deterministic, bit for bit.

0 * inf is NaN: a gradient that is not finite spreads to the other rows of its column. That keeps this kernel
out of the package however fast it is.
"""

import triton
import triton.language as tl

from gpu_embed.kernels.gather import load_indices


# grid:  (num_splits, cdiv(D, BLOCK_D))
# tile: BLOCK_V rows by BLOCK_D columns of fp32 sums; BLOCK_N ids a step
# owner: program (s, j): partial[s, :, j * BLOCK_D ...], the sums of split s of the ids
# why:   the whole table fits in registers, so no two programs add to one row, however hot it is
@triton.jit
def one_hot_kernel(
    grad_output_ptr,  # bf16 or fp16, [num_indices, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    partial_ptr,  # fp32, [num_splits, num_embeddings, D], contiguous
    num_indices,
    num_embeddings,
    padding_idx,  # -1: none
    split_size,  # ids a split
    grad_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    grad_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    BLOCK_V: tl.constexpr,  # from num_embeddings on
    BLOCK_N: tl.constexpr,  # divides split_size
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_V)[:, None]  # [BLOCK_V, 1]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for start in range(0, split_size, BLOCK_N):
        n = split * split_size + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        index, added, _ = load_indices(indices_ptr, n, n < num_indices, num_embeddings, padding_idx)
        grad = tl.load(
            grad_output_ptr + (n * grad_row_stride * VEC)[:, None] + d * grad_col_stride,
            mask=added[:, None] & (d < D),
            other=0,
        )  # [BLOCK_N, BLOCK_D]
        # Ids without a gradient have zeros behind them.
        one_hot = row == index[None, :]  # [BLOCK_V, BLOCK_N]
        total = tl.dot(one_hot.to(grad.dtype), grad, total)
    tl.store(
        partial_ptr + (split * num_embeddings + row) * D + d,
        total,
        mask=(row < num_embeddings) & (d < D),
    )


# grid:  (cdiv(num_items, BLOCK),)
# tile: SPLITS partial sums by BLOCK items, one tile
# owner: program i: items [i * BLOCK, ...) of the flattened grad_weight
# why:   one tree over all splits, in the same order on every card, rounds once
@triton.jit
def sum_splits_kernel(
    partial_ptr,  # fp32, [num_splits, num_items], contiguous
    grad_weight_ptr,  # bf16 or fp16, [num_items], contiguous
    num_splits,
    num_items,
    SPLITS: tl.constexpr,  # from num_splits on
    BLOCK: tl.constexpr,
):
    split = tl.arange(0, SPLITS)[:, None]  # [SPLITS, 1]
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    partial = tl.load(
        partial_ptr + split.to(tl.int64) * num_items + item[None, :],
        mask=(split < num_splits) & (item < num_items)[None, :],
        other=0,
    )  # [SPLITS, BLOCK]
    total = tl.sum(partial, 0)
    tl.store(
        grad_weight_ptr + item, total.to(grad_weight_ptr.dtype.element_ty), mask=item < num_items
    )
