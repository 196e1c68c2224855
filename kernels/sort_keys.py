"""Sort keys: a key is the id, or the sentinel num_embeddings for an id without a gradient; it sorts last."""

import triton
import triton.language as tl

from .lanes import block_positions


# grid:  (cdiv(num_indices, BLOCK),)
# tile:  BLOCK ids
# owner: program i: keys [i * BLOCK, ...)
# why:   keys of the narrowest dtype, masked in one launch, for torch.sort
@triton.jit
def sort_keys_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    keys_ptr,  # the narrowest integer dtype that holds num_embeddings, [num_indices]
    num_indices,
    num_embeddings,
    padding_idx,  # -1: none
    BLOCK: tl.constexpr,
):
    n = block_positions(BLOCK)  # [BLOCK]
    index = tl.load(indices_ptr + n, mask=n < num_indices, other=0).to(tl.int64)
    kept = (index >= 0) & (index < num_embeddings) & (index != padding_idx)
    key = tl.where(kept, index, num_embeddings)
    tl.store(keys_ptr + n, key.to(keys_ptr.dtype.element_ty), mask=n < num_indices)
