// Histogram of the ids.

#include "common.cuh"

// grid:  cdiv(num_indices, blockDim.x); block: 1-D
// owner: thread i of the grid: position i of indices
// why:   one atomic per id
extern "C" __global__ void counts_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    int32* counts_ptr,                     // [num_embeddings], zero on entry
    int64 num_indices,
    int64 num_embeddings,
    int64 first_row,  // of a shard, in the whole table, which the ids are of; no shard: 0
    int64 index_bytes) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 row = local_row(load_integer(indices_ptr, n, index_bytes), first_row);
  if (names_row(row, num_embeddings)) atomicAdd(counts_ptr + row, 1);
}
