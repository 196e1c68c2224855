// Segment sum of sorted keys: a deterministic gradient; each row of grad_weight is written and rounded once.
//
// The sorted keys are cut into chunks; runs that cross chunk edges leave partial sums, which a second launch joins, as
// segment_sum.py draws it: slot 2c holds the carry-in of chunk c, slot 2c + 1 its carry-out.

#include "common.cuh"
#include "segment_walk.cuh"

// Stores a run's sum, rounded once. SCALE_GRAD_BY_FREQ: divided by the number of its ids.
template <typename Grad, int VEC, bool SCALE_GRAD_BY_FREQ, bool ATOMIC>
struct StoreGradient {
  using Acc = typename Accumulator<Grad>::type;
  // An enumerator: a static constant member would lie in global memory.
  enum : bool { ATOMIC_CARRY = ATOMIC };
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

  // A carry: other chunks add to the same row.
  __device__ void add(int64 key, int64 d, const Vector<Acc, VEC>& total) const {
    atomic_add_vector(grad_weight_ptr + key * D + d, total);
  }
};

// grid:  cdiv(num_chunks * D / VEC, blockDim.x); block: 1-D
// owner: thread i of the grid: chunk i / (D / VEC), VEC columns from i % (D / VEC) * VEC on; join: of the runs that cross
//        an edge, that which begins in the chunk
// why:   each thread reduces its own part (sum_runs): no shared memory, no __syncthreads
//
// BAGS: position n reads row bag_of[n] of values, times its per-sample weight or over its bag's size.
template <
    typename Value,
    typename Grad,
    int VEC,
    bool SCALE_GRAD_BY_FREQ,
    int UNROLL,
    bool ATOMIC_CARRY,
    bool BAGS = false>
__global__ void segment_sum_kernel(
    const Value* __restrict__ values_ptr,  // [*, D], any strides (VEC > 1: column stride 1): grad_output
    const void* __restrict__ order_ptr,    // [num_keys]: each key's position before the sort
    const void* __restrict__ keys_ptr,     // [num_keys], sorted; keys outside [0, num_embeddings) are skipped
    const void* __restrict__ bag_of_ptr,   // BAGS: [num_indices]: each position's bag, -1: in no bag
    const Grad* __restrict__ per_sample_weights_ptr,  // BAGS: [num_indices]; null: all 1
    const int32* __restrict__ sizes_ptr,              // BAGS: [num_bags]: the divisors of means; null: all 1
    Grad* __restrict__ grad_weight_ptr,               // [num_embeddings, D], contiguous, zero on entry
    // [2 * num_chunks, D], by slot; SCALE_GRAD_BY_FREQ: behind that the ids of each slot, [2 * num_chunks].
    // ATOMIC_CARRY: null: atomics add the carries to grad_weight, which then is fp32 or fp64.
    typename Accumulator<Grad>::type* __restrict__ partial_ptr,
    int64 num_keys,
    int64 num_embeddings,
    int64 chunk_size,
    int64 value_row_stride,  // in units of VEC elements
    int64 value_col_stride,  // in elements
    int64 D,                 // VEC divides it
    int64 JOIN,  // 1: the second launch
    int64 order_bytes,
    int64 key_bytes,
    int64 bag_bytes) {
  using Acc = typename Accumulator<Grad>::type;
  sum_runs<Value, Acc, VEC, SCALE_GRAD_BY_FREQ, UNROLL, BAGS>(
      values_ptr, order_ptr, keys_ptr, bag_of_ptr, per_sample_weights_ptr, sizes_ptr, partial_ptr,
      num_keys, num_embeddings, value_row_stride, value_col_stride, D, chunk_size, JOIN, order_bytes,
      key_bytes, bag_bytes, StoreGradient<Grad, VEC, SCALE_GRAD_BY_FREQ, ATOMIC_CARRY>{grad_weight_ptr, D});
}
