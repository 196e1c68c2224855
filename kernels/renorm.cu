// max_norm: scale every looked-up row whose p-norm exceeds max_norm, in place.

#include "common.cuh"

enum Norm { NORM_INF, NORM_MINUS_INF, NORM_0, NORM_1, NORM_2, NORM_P };

// Accumulates one column into the norm, before the root. NaN propagates.
template <typename Acc>
__device__ inline Acc add_power(Acc total, Acc magnitude, Acc norm_type, int64 NORM) {
  switch (NORM) {
    case NORM_INF:
      return magnitude > total || magnitude != magnitude ? magnitude : total;
    case NORM_MINUS_INF:
      return magnitude < total || magnitude != magnitude ? magnitude : total;
    case NORM_0:
      return total + (magnitude != 0 ? 1 : 0);
    case NORM_1:
      return total + magnitude;
    case NORM_2:
      return total + magnitude * magnitude;
    default:
      return total + pow(magnitude, norm_type);
  }
}

// grid:  cdiv(num_indices, blockDim.x); block: 1-D
// owner: thread i of the grid: key i; the first key of a run of equal ones owns its row
// why:   one owner per row, so the update in place needs no atomics
template <typename Weight>
__global__ void renorm_kernel(
    Weight* weight_ptr,                 // [num_embeddings, D], any strides
    const void* __restrict__ keys_ptr,  // [num_indices], sorted, as sort_keys.cu makes them
    int64 num_indices,
    int64 num_embeddings,
    int64 last_valid_key,     // larger ones are sentinels of ids out of range
    int64 weight_row_stride,  // in elements
    int64 weight_col_stride,  // in elements
    double max_norm,
    double norm_type,
    int64 D,
    int64 NORM,
    int64 key_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  constexpr int BLOCK_D = 16;
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  // Sentinels sort last. If one is of an id out of range, the call leaves the whole table unchanged.
  if (load_key(keys_ptr, num_indices - 1, key_bytes) > last_valid_key) return;
  const int64 key = load_key(keys_ptr, n, key_bytes);
  if (key >= num_embeddings) return;
  if (n > 0 && key == load_key(keys_ptr, n - 1, key_bytes)) return;
  Weight* const row_ptr = weight_ptr + key * weight_row_stride;

  const bool is_sum = NORM != NORM_INF && NORM != NORM_MINUS_INF;
  const Acc neutral = NORM == NORM_MINUS_INF ? (Acc)__uint_as_float(0x7f800000u) : (Acc)0;
  Acc norm = neutral;
  for (int64 first = 0; first < D; first += BLOCK_D) {
    // Summed in blocks: the rounding error of a long row grows with the number of blocks, not of columns.
    Acc block = neutral;
    for (int64 d = first; d < D && d < first + BLOCK_D; ++d) {
      const Acc magnitude = fabs(widen(row_ptr[d * weight_col_stride]));
      block = add_power(block, magnitude, (Acc)norm_type, NORM);
    }
    norm = is_sum ? norm + block : add_power(norm, block, (Acc)norm_type, NORM);
  }
  if (NORM == NORM_2) norm = sqrt(norm);
  if (NORM == NORM_P) norm = pow(norm, 1 / (Acc)norm_type);

  const Acc limit = (Acc)max_norm;
  if (!(norm > limit)) return;
  const Acc scale = limit / (norm + (Acc)1e-7);
  for (int64 d = 0; d < D; ++d) {
    Weight& value = row_ptr[d * weight_col_stride];
    narrow(widen(value) * scale, value);
  }
}
