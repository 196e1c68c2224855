// Segment sum of sorted keys: a deterministic gradient; each row of grad_weight is written and rounded once.
//
// The sorted keys are cut into chunks; runs that cross chunk edges leave partial sums, which a second launch joins, as
// segment_sum.py draws it: slot 2c holds the carry-in of chunk c, slot 2c + 1 its carry-out.

#include "common.cuh"
#include "segment_walk.cuh"

// Stores a run's sum, rounded once. SCALE_GRAD_BY_FREQ: divided by the number of its ids. IN_PLACE: added to the row.
template <typename Grad, int VEC, bool SCALE_GRAD_BY_FREQ, bool ATOMIC, bool IN_PLACE>
struct StoreGradient {
  using Acc = typename Accumulator<Grad>::type;
  using Row = Vector<Grad, VEC>;
  // An enumerator: a static constant member would lie in global memory.
  enum : bool { ATOMIC_CARRY = ATOMIC };
  Grad* grad_weight_ptr;
  int64 D;
  int64 row_stride;  // IN_PLACE: in units of VEC elements
  int64 col_stride;  // IN_PLACE: in elements

  __device__ Grad* columns(int64 key, int64 d) const {
    return grad_weight_ptr + (IN_PLACE ? key * row_stride * VEC + d * col_stride : key * D + d);
  }

  __device__ Row load(int64 key, int64 d) const {
    Row row;
    set_zero(row);
    if (IN_PLACE) row = *(const Row*)columns(key, d);
    return row;
  }

  __device__ void operator()(
      int64 key, int64 d, const Vector<Acc, VEC>& total, int32 count, Row row) const {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const Acc sum = SCALE_GRAD_BY_FREQ ? total.lane[i] / (Acc)count : total.lane[i];
      narrow(IN_PLACE ? widen(row.lane[i]) + sum : sum, row.lane[i]);
    }
    *(Row*)columns(key, d) = row;
  }

  // A carry: other chunks add to the same row.
  __device__ void add(int64 key, int64 d, const Vector<Acc, VEC>& total) const {
    atomic_add_vector(columns(key, d), total);
  }
};

// grid:  cdiv(num_chunks * D / VEC, blockDim.x); block: 1-D
// owner: thread i of the grid: chunk i / (D / VEC), VEC columns from i % (D / VEC) * VEC on; join: of the runs that cross
//        an edge, that which begins in the chunk
// why:   each thread reduces its own part (sum_runs): no shared memory, no __syncthreads
//
// IN_PLACE: a template argument, since a row that is read costs registers.
// BAGS: position n reads row bag_of[n] of values, times its per-sample weight or over its bag's size.
template <
    typename Value,
    typename Grad,
    int VEC,
    bool SCALE_GRAD_BY_FREQ,
    int UNROLL,
    bool ATOMIC_CARRY,
    bool BAGS,
    bool IN_PLACE>
__global__ void segment_sum_kernel(
    const Value* __restrict__ values_ptr,  // [*, D], any strides (VEC > 1: column stride 1): grad_output
    const void* __restrict__ order_ptr,    // [num_keys]: each key's position before the sort
    const void* __restrict__ keys_ptr,     // [num_keys], sorted; keys outside [0, num_embeddings) are skipped
    const void* __restrict__ bag_of_ptr,   // BAGS: [num_indices]: each position's bag, -1: in no bag
    const Value* __restrict__ per_sample_weights_ptr,  // BAGS: [num_indices]; null: all 1
    const int32* __restrict__ sizes_ptr,               // BAGS: [num_bags]: the divisors of means; null: all 1
    // [num_embeddings, D]. IN_PLACE: any strides (VEC > 1: column stride 1); else contiguous, zero on entry
    Grad* __restrict__ grad_weight_ptr,
    // [2 * num_chunks, D], by slot; SCALE_GRAD_BY_FREQ: behind that the ids of each slot, [2 * num_chunks].
    // ATOMIC_CARRY: null: atomics add the carries to grad_weight, which then is fp32 or fp64.
    typename Accumulator<Grad>::type* __restrict__ partial_ptr,
    int64 num_keys,
    int64 num_embeddings,
    int64 chunk_size,
    int64 value_row_stride,        // in units of VEC elements
    int64 value_col_stride,        // in elements
    int64 grad_weight_row_stride,  // IN_PLACE: in units of VEC elements
    int64 grad_weight_col_stride,  // IN_PLACE: in elements
    int64 D,                       // VEC divides it
    int64 JOIN,                    // 1: the second launch
    int64 order_bytes,
    int64 key_bytes,
    int64 bag_bytes) {
  using Acc = typename Accumulator<Grad>::type;
  sum_runs<Value, Acc, VEC, SCALE_GRAD_BY_FREQ, UNROLL, BAGS>(
      values_ptr, order_ptr, keys_ptr, bag_of_ptr, per_sample_weights_ptr, sizes_ptr, partial_ptr,
      num_keys, num_embeddings, value_row_stride, value_col_stride, D, chunk_size, JOIN, order_bytes,
      key_bytes, bag_bytes,
      StoreGradient<Grad, VEC, SCALE_GRAD_BY_FREQ, ATOMIC_CARRY, IN_PLACE>{
          grad_weight_ptr, D, grad_weight_row_stride, grad_weight_col_stride});
}
