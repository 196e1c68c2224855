// Sorted segment gradient: deterministic, each row of grad_weight written once, rounded once.
//
// The sorted ids are cut into chunks of CHUNK. A run of equal ids that lies inside one chunk is summed in
// registers and stored. A run that crosses a chunk's edge leaves partial sums: at most one at each end of a
// chunk. The partial sums are again sorted by key, so the same kernel sums them, level by level, until one
// chunk holds all that is left. The cut depends on the number of ids alone, so the order of the additions,
// and with it every bit of the result, is the same from run to run.

#include "common.cuh"
#include "segment_walk.cuh"

// Stores the sum, divided by the number of ids behind it if that is asked for, rounded once.
template <typename Grad, int VEC, bool SCALE_GRAD_BY_FREQ, bool ATOMIC>
struct StoreGradient {
  using Acc = typename Accumulator<Grad>::type;
  // An enumerator, as a constant member would lie in global memory.
  enum : bool { ATOMIC_ENDS = ATOMIC };
  Grad* grad_weight_ptr;
  int64 D;

  __device__ void operator()(int64 key, int64 d, const Vector<Acc, VEC>& total, int32 count) const {
    Vector<Grad, VEC> row;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      narrow(SCALE_GRAD_BY_FREQ ? total.lane[i] / (Acc)count : total.lane[i], row.lane[i]);
    }
    *(Vector<Grad, VEC>*)(grad_weight_ptr + key * D + d) = row;
  }

  // To a row that other chunks add to as well.
  __device__ void add(int64 key, int64 d, const Vector<Acc, VEC>& total) const {
    atomic_add_vector(grad_weight_ptr + key * D + d, total);
  }
};

// BAGS: a key's position n takes row bag_of[n] of values, times its per-sample weight, over its bag's size.
template <
    typename Value,
    typename Grad,
    int VEC,
    bool SCALE_GRAD_BY_FREQ,
    int UNROLL,
    bool ATOMIC_ENDS,
    bool BAGS = false>
__global__ void segment_sum_kernel(
    // [*, D], any strides (VEC > 1: column stride 1): grad_output, or the partial sums of the level below
    const Value* __restrict__ values_ptr,
    const void* __restrict__ order_ptr,    // [num_keys]: the row of values of each key; null: its place
    const void* __restrict__ keys_ptr,     // [num_keys], sorted; keys that name no row take no part
    const int32* __restrict__ counts_ptr,  // [num_keys]: ids behind each value; null: one
    const void* __restrict__ bag_of_ptr,   // BAGS: [num_indices], -1: in no bag
    const Grad* __restrict__ per_sample_weights_ptr,  // BAGS: [num_indices]; null: 1
    const int32* __restrict__ sizes_ptr,              // BAGS: [num_bags]; null: 1
    Grad* __restrict__ grad_weight_ptr,    // [num_embeddings, D], contiguous, zero on entry
    // [2 * num_chunks, D]: row 2c leads chunk c, row 2c + 1 trails it. ATOMIC_ENDS: null, and so are the next two;
    // atomics add both to grad_weight, which is fp32 or fp64 then.
    typename Accumulator<Grad>::type* __restrict__ partial_values_ptr,
    int64* __restrict__ partial_keys_ptr,    // [2 * num_chunks]; -1: no such partial sum
    int32* __restrict__ partial_counts_ptr,  // [2 * num_chunks]
    int64 num_keys,
    int64 num_embeddings,
    int64 value_row_stride,  // in units of VEC elements
    int64 value_col_stride,  // in elements
    int64 D,                 // VEC divides it
    int64 CHUNK,             // UNROLL divides it
    int64 order_bytes,
    int64 key_bytes,
    int64 bag_bytes) {
  using Acc = typename Accumulator<Grad>::type;
  walk_runs<Value, Acc, VEC, SCALE_GRAD_BY_FREQ, UNROLL, BAGS>(
      values_ptr, order_ptr, keys_ptr, counts_ptr, bag_of_ptr, per_sample_weights_ptr, sizes_ptr,
      partial_values_ptr, partial_keys_ptr, partial_counts_ptr, num_keys, num_embeddings,
      value_row_stride, value_col_stride, D, CHUNK, order_bytes, key_bytes, bag_bytes,
      StoreGradient<Grad, VEC, SCALE_GRAD_BY_FREQ, ATOMIC_ENDS>{grad_weight_ptr, D});
}
