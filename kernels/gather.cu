// Row gather: output[n] = weight[indices[n]], copied as raw bits.
//
// The host views every dtype as words of 1, 2, 4, 8 or 16 bytes, the widest that the rows' alignment allows: one
// kernel serves all dtypes.

#include "common.cuh"

// grid:  (cdiv(num_indices, blockDim.y * ROWS), min(cdiv(D, blockDim.x), 65535))
// block: 2-D; x runs along a row, y over rows
// owner: thread (x, y) of block (i, j): ROWS rows of the output from (i * blockDim.y + y) * ROWS on; in each, word
//        j * blockDim.x + x and every gridDim.y * blockDim.x further
// why:   the ROWS loads are in flight together, and no division finds a word's id
//
// SHARD: a template argument, since first_row costs registers.
template <typename Word, int ROWS, bool SHARD>
__global__ void gather_rows_kernel(
    const Word* __restrict__ weight_ptr,   // [num_embeddings, D], any strides
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    Word* __restrict__ output_ptr,         // [num_indices, D], contiguous
    int64* record_ptr,                     // [7]; null: do not record
    int32* flag_ptr,                       // [1], pinned host memory; null: do not record
    int64 num_indices,
    int64 num_embeddings,
    int64 first_row,          // SHARD: its first row in the whole table, which the ids are of
    int64 table_rows,         // SHARD: rows of the whole table
    int64 zero_idx,           // this id's rows are zeroed; -1: none
    int64 weight_row_stride,  // in words
    int64 weight_col_stride,  // in words
    int64 D,                  // words per row
    int64 index_bytes) {
  const int64 first_n = ((int64)blockIdx.x * blockDim.y + threadIdx.y) * ROWS;
  const int64 first_d = (int64)blockIdx.y * blockDim.x + threadIdx.x;
  int64 index[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64 n = first_n + r;
    index[r] = n < num_indices ? load_integer(indices_ptr, n, index_bytes) : -1;
  }
  // Unrolled, the loop would count its rounds first, with a 64-bit division.
#pragma unroll 1
  for (int64 d = first_d; d < D; d += (int64)gridDim.y * blockDim.x) {
    Word word[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64 row = local_row<SHARD>(index[r], first_row);
      const bool copied = names_row(row, num_embeddings) && index[r] != zero_idx;
      word[r] = copied ? weight_ptr[row * weight_row_stride + d * weight_col_stride] : Word{};
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first_n + r < num_indices) output_ptr[(first_n + r) * D + d] = word[r];
    }
  }
  if (!record_ptr || first_d > 0) return;
  const int64 limit = SHARD ? table_rows : num_embeddings;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (first_n + r < num_indices && !names_row(index[r], limit)) {
      record_out_of_range(record_ptr, flag_ptr, first_n + r, index[r], limit);
    }
  }
}

// grid:  cdiv(num_indices * D, blockDim.x * UNROLL); block: 1-D
// owner: block i: words [i * blockDim.x * UNROLL, ...) of the flattened output, across row boundaries
// why:   no lane idles when a row is shorter than a warp, or its length no power of two
template <typename Word, int UNROLL, bool SHARD>
__global__ void gather_flat_kernel(
    const Word* __restrict__ weight_ptr,   // [num_embeddings, D], any strides
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    Word* __restrict__ output_ptr,         // [num_indices, D], contiguous
    int64* record_ptr,                     // [7]; null: do not record
    int32* flag_ptr,                       // [1], pinned host memory; null: do not record
    int64 num_indices,
    int64 num_embeddings,
    int64 first_row,          // SHARD: its first row in the whole table, which the ids are of
    int64 table_rows,         // SHARD: rows of the whole table
    int64 zero_idx,           // this id's rows are zeroed; -1: none
    int64 weight_row_stride,  // in words
    int64 weight_col_stride,  // in words
    int64 D,                  // words per row, < 2**31
    int64 index_bytes) {
  const int64 start = (int64)blockIdx.x * blockDim.x * UNROLL;
  const int64 first_n = start / D;
  // One 64-bit division per thread; its UNROLL others are in 32 bits.
  const uint32 first_flat_offset = (uint32)(start - first_n * D) + threadIdx.x;
  int64 n[UNROLL];
  int64 d[UNROLL];
  int64 index[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const uint32 flat_offset = first_flat_offset + u * blockDim.x;
    n[u] = first_n + flat_offset / (uint32)D;
    d[u] = flat_offset % (uint32)D;
    index[u] = n[u] < num_indices ? load_integer(indices_ptr, n[u], index_bytes) : -1;
  }
  Word word[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64 row = local_row<SHARD>(index[u], first_row);
    const bool copied = names_row(row, num_embeddings) && index[u] != zero_idx;
    word[u] = copied ? weight_ptr[row * weight_row_stride + d[u] * weight_col_stride] : Word{};
  }
  const int64 limit = SHARD ? table_rows : num_embeddings;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (n[u] >= num_indices) break;
    output_ptr[start + u * blockDim.x + threadIdx.x] = word[u];
    if (record_ptr && d[u] == 0 && !names_row(index[u], limit)) {
      record_out_of_range(record_ptr, flag_ptr, n[u], index[u], limit);
    }
  }
}
