"""Whole rows through tensor descriptors (TMA, compute capability 9.0): one instruction moves, or adds, a row.

TMA reads zeros outside of a tensor and drops what would be written there. So row -1 stands for every id that
must not be touched, and no row needs a mask at its end. Its coordinates are 32 bit, its addresses 64 bit.
"""

import triton
import triton.language as tl

from gpu_embed.kernels.bounds import record_out_of_range
from gpu_embed.kernels.gather import load_indices


# grid:  (cdiv(num_indices, ROWS), cdiv(D, BLOCK_D))
# tile: ROWS rows of BLOCK_D words, one after another; one warp
# owner: program (i, j): rows [i * ROWS, ...) of the output, words [j * BLOCK_D, ...) of each
# why:   the copies pass through shared memory alone; one thread issues them, STAGES - 1 in flight
@triton.jit
def gather_descriptor_kernel(
    weight_desc,  # int32 words, [num_embeddings, D], blocks of [1, BLOCK_D]
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    output_desc,  # int32 words, [num_indices, D], blocks of [1, BLOCK_D]
    record_ptr,  # int64 [7]; None: do not record
    flag_ptr,  # int32 [1], pinned host memory; None: do not record
    num_indices,
    num_embeddings,
    zero_idx,  # this id's rows are zeroed; -1: none
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,  # one more than the rows in flight
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    d = tl.program_id(1) * BLOCK_D
    in_range = n < num_indices
    index, copied, out_of_range = load_indices(indices_ptr, n, in_range, num_embeddings, zero_idx)
    rows = tl.where(copied, index, -1).to(tl.int32)

    # Written out by hand, each load would be waited for before the next: only a loop is pipelined.
    for r in tl.range(0, ROWS, num_stages=STAGES):
        row = tl.sum(tl.where(tl.arange(0, ROWS) == r, rows, 0))
        words = weight_desc.load([row, d])  # [1, BLOCK_D]
        output_desc.store([tl.program_id(0) * ROWS + r, d], words)
    if record_ptr is not None:
        first_columns = tl.program_id(1) == 0
        record_out_of_range(
            record_ptr, flag_ptr, out_of_range & first_columns, n, index, num_embeddings
        )


# grid:  (cdiv(num_indices, ROWS), cdiv(D, BLOCK_D))
# tile: ROWS rows of BLOCK_D columns, all in flight; one warp
# owner: program (i, j): rows [i * ROWS, ...) of grad_output, columns [j * BLOCK_D, ...) of each;
#        rows of grad_weight are shared
# why:   one bulk reduction a row takes the place of an atomic for each vector
@triton.jit
def scatter_add_descriptor_kernel(
    grad_output_ptr,  # fp32, [num_indices, D], any strides
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    grad_weight_desc,  # fp32, [num_embeddings, D], blocks of [1, BLOCK_D], zero on entry
    num_indices,
    num_embeddings,
    padding_idx,  # -1: none
    grad_row_stride,  # in units of VEC elements, so that the compiler sees the alignment
    grad_col_stride,  # in elements
    D: tl.constexpr,
    VEC: tl.constexpr,  # elements a thread loads with one instruction
    ROWS: tl.constexpr,  # rows in flight
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(1) * BLOCK_D
    column = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    rows = ()
    grads = ()
    # All loads are issued before the first sum needs one.
    for r in tl.static_range(ROWS):
        n = tl.program_id(0).to(tl.int64) * ROWS + r
        index, added, _ = load_indices(indices_ptr, n, n < num_indices, num_embeddings, padding_idx)
        rows += (tl.where(added, index, -1).to(tl.int32),)
        grads += (
            tl.load(
                grad_output_ptr + n * grad_row_stride * VEC + column * grad_col_stride,
                mask=added & (column < D),
                other=0,
            ),
        )
    for r in tl.static_range(ROWS):
        grad_weight_desc.atomic_add([rows[r], d], grads[r])
