"""Histogram of the ids."""

import triton
import triton.language as tl

from .bounds import local_row
from .lanes import block_positions


# grid:  (cdiv(num_indices, BLOCK),)
# tile:  BLOCK ids
# owner: program i: positions [i * BLOCK, ...) of indices
# why:   one relaxed atomic per id; nothing in this launch reads the counts
@triton.jit(do_not_specialize=["first_row"])  # one binary for all ranks
def counts_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    counts_ptr,  # int32 [num_embeddings], zero on entry
    num_indices,
    num_embeddings,
    first_row,  # of this shard in a larger table, which has the ids; None: no shard
    BLOCK: tl.constexpr,
):
    n = block_positions(BLOCK)  # [BLOCK]
    index = tl.load(indices_ptr + n, mask=n < num_indices, other=-1).to(tl.int64)
    row = local_row(index, first_row)
    counted = (n < num_indices) & (row >= 0) & (row < num_embeddings)
    tl.atomic_add(counts_ptr + row, 1, mask=counted, sem="relaxed")
