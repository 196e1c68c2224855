"""Sort keys: a key is the row, or the sentinel num_embeddings for an id without a gradient; it sorts last."""

import triton
import triton.language as tl

from .bounds import local_row
from .lanes import block_positions


@triton.jit
def store_key(keys_ptr, n, row, mask):
    """Store the keys of row numbers. torch.sort takes no uint16 on CUDA, so an int16 key is the row less 32,768."""
    if keys_ptr.dtype.element_ty == tl.int16:
        row -= 32768
    tl.store(keys_ptr + n, row.to(keys_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_key(keys_ptr, n, mask):
    """The row number of each key, int64; where masked, that of no row."""
    if keys_ptr.dtype.element_ty == tl.int16:
        key = tl.load(keys_ptr + n, mask=mask, other=32767).to(tl.uint16, bitcast=True)
        # To turn the sign bit adds 32,768; unsigned, so that 64 bits need no extension.
        row = (key.to(tl.uint32) ^ 0x8000).to(tl.int64)
    else:
        row = tl.load(keys_ptr + n, mask=mask, other=-1).to(tl.int64)
    return row


# grid:  (cdiv(num_indices, BLOCK),)
# tile:  BLOCK ids
# owner: program i: keys [i * BLOCK, ...)
# why:   keys of the narrowest dtype, masked in one launch, for torch.sort
@triton.jit(do_not_specialize=["first_row"])  # one binary for all ranks
def sort_keys_kernel(
    indices_ptr,  # any integer dtype, [num_indices], contiguous
    keys_ptr,  # [num_indices], of `sort_key_dtype`
    num_indices,
    num_embeddings,
    first_row,  # of this shard in a table of table_rows rows, which has the ids; None: no shard
    table_rows,  # None: no shard; else ids out of range get the sentinel num_embeddings + 1
    padding_idx,  # -1: none
    BLOCK: tl.constexpr,
):
    n = block_positions(BLOCK)  # [BLOCK]
    index = tl.load(indices_ptr + n, mask=n < num_indices, other=0).to(tl.int64)
    row = local_row(index, first_row)
    kept = (row >= 0) & (row < num_embeddings) & (index != padding_idx)
    key = tl.where(kept, row, num_embeddings)
    if table_rows is not None:
        key = tl.where((index >= 0) & (index < table_rows), key, key + 1)
    store_key(keys_ptr, n, key, n < num_indices)
