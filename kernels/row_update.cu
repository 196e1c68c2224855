// One optimizer step on the rows that have a gradient: a segment sum that ends in an update of the row.
// The formulas are those of gpu_embed/row_update.py, operation by operation, so it is compiled without fused
// multiply-adds.

#include "common.cuh"
#include "segment_walk.cuh"
#include "update.cuh"

// Thread i of the grid owns position i of indices.
extern "C" __global__ void select_rows_kernel(
    const int64* __restrict__ indices_ptr,  // [num_indices]
    const uint8* __restrict__ rows_ptr,     // [num_embeddings]: 1: the row may change, 0: it may not
    int64* __restrict__ selected_ptr,       // [num_indices]: the id, or -1 if its row may not change
    int64 num_indices,
    int64 num_embeddings) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 index = indices_ptr[n];
  selected_ptr[n] = names_row(index, num_embeddings) && rows_ptr[index] ? index : -1;
}

// Where a row of one table lies.
template <typename Weight, int VEC>
struct RowUpdate : Update<Weight, VEC> {
  using Acc = typename Accumulator<Weight>::type;
  enum : bool { ATOMIC_CARRY = false };
  int64 row_stride;  // in elements
  int64 col_stride;  // in elements
  int64 D;

  __device__ void operator()(int64 key, int64 d, const Vector<Acc, VEC>& total, int32) const {
    this->update(key, key * row_stride + d * col_stride, key * D + d, d, total);
  }
};

// The grid, the walk and the levels are those of segment_sum_kernel.
template <typename Value, typename Weight, int VEC, int UNROLL>
__global__ void row_update_kernel(
    // [*, D], any strides (VEC > 1: column stride 1): the gradient, or the partial sums of the level below
    const Value* __restrict__ values_ptr,
    const void* __restrict__ order_ptr,  // [num_keys]: the row of values of each key; null: its place
    const void* __restrict__ keys_ptr,    // [num_keys], sorted; keys that name no row take no part
    Weight* weight_ptr,                   // [num_embeddings, D], any strides (VEC > 1: column stride 1)
    typename Accumulator<Weight>::type* state_ptr,         // [num_embeddings, D], or null
    typename Accumulator<Weight>::type* second_state_ptr,  // [num_embeddings, D], or null
    // [2 * num_chunks, D]: row 2c leads chunk c, row 2c + 1 trails it
    typename Accumulator<Weight>::type* __restrict__ partial_values_ptr,
    int64* __restrict__ partial_keys_ptr,  // [2 * num_chunks]; -1: no such partial sum
    const double* __restrict__ lr_ptr,     // [1]: multiplies step_size and decay; null: 1
    int64 num_keys,
    int64 num_embeddings,
    int64 value_row_stride,   // in units of VEC elements
    int64 value_col_stride,   // in elements
    int64 weight_row_stride,  // in elements
    int64 weight_col_stride,  // in elements
    double step_size,
    double decay,
    double eps,
    double avg_weight,
    double sq_weight,
    double momentum,
    double weight_decay,
    double grad_scale,
    int64 seed,
    int64 step,
    int64 D,  // VEC divides it
    int64 FORMULA,
    int64 STOCHASTIC_ROUNDING,
    int64 CHUNK,  // UNROLL divides it
    int64 order_bytes,
    int64 key_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const double lr = lr_ptr ? *lr_ptr : 1.0;
  const RowUpdate<Weight, VEC> update = {
      {weight_ptr, state_ptr, second_state_ptr, FORMULA, (Acc)(step_size * lr),
       (Acc)(1.0 - decay * lr), (Acc)eps, (Acc)avg_weight, (Acc)sq_weight, (Acc)momentum,
       (Acc)weight_decay, (Acc)grad_scale,
       STOCHASTIC_ROUNDING, seed, step},
      weight_row_stride, weight_col_stride, D};
  walk_runs<Value, Acc, VEC, false, UNROLL, false>(
      values_ptr, order_ptr, keys_ptr, nullptr, nullptr, (const Weight*)nullptr, nullptr, partial_values_ptr,
      partial_keys_ptr, nullptr, num_keys, num_embeddings, value_row_stride, value_col_stride, D,
      CHUNK, order_bytes, key_bytes, 0, update);
}

// Thread i of the grid owns run i, whose summed gradient lies in memory: it sees the row as a whole.
template <typename Weight>
__global__ void rowwise_adagrad_kernel(
    const typename Accumulator<Weight>::type* __restrict__ total_ptr,  // [num_runs, D], contiguous
    const int64* __restrict__ keys_ptr,  // [num_runs]: the row of each; others than rows take no part
    Weight* weight_ptr,                  // [num_embeddings, D], any strides
    typename Accumulator<Weight>::type* state_ptr,  // [num_embeddings]
    const double* __restrict__ lr_ptr,              // [1]: multiplies step_size; null: 1
    int64 num_embeddings,
    int64 weight_row_stride,  // in elements
    int64 weight_col_stride,  // in elements
    double step_size,
    double eps,
    double weight_decay,
    double grad_scale,
    int64 seed,
    int64 step,
    int64 D,
    int64 STOCHASTIC_ROUNDING,
    int64 num_runs) {
  const int64 run = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (run >= num_runs || !names_row(keys_ptr[run], num_embeddings)) return;
  const int64 key = keys_ptr[run];
  update_by_mean_square(
      total_ptr + run * D, weight_ptr + key * weight_row_stride, weight_col_stride, state_ptr + key,
      lr_ptr ? *lr_ptr : 1.0, step_size, eps, weight_decay, grad_scale, seed, step, key, D, STOCHASTIC_ROUNDING);
}
