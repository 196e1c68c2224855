// Sort keys: a key is the id's row, or the sentinel num_embeddings for an id without a gradient; it sorts last.
// Of a shard, an id out of range has a sentinel of its own, num_embeddings + 1.

#include "common.cuh"

// grid:  cdiv(num_indices, blockDim.x); block: 1-D
// owner: thread i of the grid: key i
// why:   keys of the narrowest dtype, masked in one launch, for torch.sort
//
// SHARD: a template argument, since the second sentinel costs instructions.
template <bool SHARD>
__global__ void sort_keys_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    void* __restrict__ keys_ptr,           // [num_indices], of `sort_key_dtype`
    int64 num_indices,
    int64 num_embeddings,
    int64 first_row,    // SHARD: its first row in the whole table, which the ids are of
    int64 table_rows,   // SHARD: rows of the whole table
    int64 padding_idx,  // -1: none
    int64 index_bytes,
    int64 key_bytes) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 index = load_integer(indices_ptr, n, index_bytes);
  const int64 row = local_row<SHARD>(index, first_row);
  const bool kept = names_row(row, num_embeddings) && index != padding_idx;
  const bool out_of_range = SHARD && !names_row(index, table_rows);
  store_key(keys_ptr, n, kept ? row : num_embeddings + out_of_range, key_bytes);
}
