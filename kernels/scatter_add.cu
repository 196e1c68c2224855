// Atomic gradient: grad_weight[indices[n]] += grad_output[n], or [bag_of[n]] for bags; in the accumulation dtype.

#include "common.cuh"

// grid:  cdiv(num_indices * D / VEC, blockDim.x * UNROLL); block: 1-D
// owner: block i: vectors [i * blockDim.x * UNROLL, ...) of the flattened [num_indices, D], across row boundaries
// why:   neighbouring threads add to neighbouring vectors, so a warp's atomics fall on whole sectors
//
// IN_PLACE: a template argument, since strides of grad_weight cost instructions.
// BAGS: position n adds row bag_of[n] of grad_output, times its per-sample weight or over its bag's size.
template <typename Value, typename Grad, int VEC, int UNROLL, bool BAGS, bool IN_PLACE>
__global__ void scatter_add_kernel(
    const Value* __restrict__ grad_output_ptr,         // [*, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,              // any integer dtype, [num_indices], contiguous
    const void* __restrict__ bag_of_ptr,               // BAGS: [num_indices]: each position's bag, -1: in no bag
    const Value* __restrict__ per_sample_weights_ptr,  // BAGS: [num_indices]; null: all 1
    const int32* __restrict__ sizes_ptr,               // BAGS: [num_bags]: the divisors of means; null: all 1
    // fp32 or fp64, [num_embeddings, D]. IN_PLACE: any strides (VEC > 1: column stride 1); else contiguous
    Grad* grad_weight_ptr,
    int64 num_indices,
    int64 num_embeddings,
    int64 first_row,               // of a shard, in the whole table, which the ids are of; no shard: 0
    int64 padding_idx,             // -1: none
    int64 grad_row_stride,         // in units of VEC elements
    int64 grad_col_stride,         // in elements
    int64 grad_weight_row_stride,  // IN_PLACE: in units of VEC elements
    int64 grad_weight_col_stride,  // IN_PLACE: in elements
    int64 D,                       // VEC divides it
    int64 index_bytes,
    int64 bag_bytes) {
  const int64 vectors = D / VEC;
  const int64 start = (int64)blockIdx.x * blockDim.x * UNROLL;
  const int64 first_n = start / vectors;
  const uint32 first_flat_offset = (uint32)(start - first_n * vectors) + threadIdx.x;
  int64 row[UNROLL];
  Vector<Value, VEC> value[UNROLL];
  Grad scale[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64 n = first_n + (first_flat_offset + u * blockDim.x) / (uint32)vectors;
    const int64 index = n < num_indices ? load_integer(indices_ptr, n, index_bytes) : -1;
    row[u] = index == padding_idx ? -1 : local_row(index, first_row);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const uint32 flat_offset = first_flat_offset + u * blockDim.x;
    const int64 n = first_n + flat_offset / (uint32)vectors;
    const int64 d = (int64)(flat_offset % (uint32)vectors) * VEC;
    if (!names_row(row[u], num_embeddings)) continue;
    const int64 grad_row = BAGS ? load_integer(bag_of_ptr, n, bag_bytes) : n;
    if (BAGS && grad_row < 0) {
      row[u] = -1;
      continue;
    }
    value[u] = *(const Vector<Value, VEC>*)(
        grad_output_ptr + grad_row * grad_row_stride * VEC + d * grad_col_stride);
    if (BAGS) scale[u] = bag_scale<Grad>(per_sample_weights_ptr, n, sizes_ptr, grad_row);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64 d = (int64)((first_flat_offset + u * blockDim.x) % (uint32)vectors) * VEC;
    if (!names_row(row[u], num_embeddings)) continue;
    Vector<Grad, VEC> grad;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      grad.lane[i] = BAGS ? widen(value[u].lane[i]) * scale[u] : widen(value[u].lane[i]);
    }
    const int64 offset = IN_PLACE ? row[u] * grad_weight_row_stride * VEC + d * grad_weight_col_stride
                                  : row[u] * D + d;
    atomic_add_vector(grad_weight_ptr + offset, grad);
  }
}
