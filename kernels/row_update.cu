// Optimizer step on the rows that have a gradient: a segment sum that ends in an update of the row.
//
// As in segment_sum_kernel, each row's gradient is summed in registers. A run is complete in exactly one thread per vector
// of columns, of the walk or of the join: that thread reads, updates and writes the row and its state, so no gradient is
// stored. The formulas are those of gpu_embed/row_update.py, operation by operation: compile with -fmad=false.

#include "common.cuh"
#include "segment_walk.cuh"
#include "update.cuh"

// grid:  cdiv(num_indices, blockDim.x); block: 1-D
// owner: thread i of the grid: position i of indices
// why:   one launch instead of a comparison, a gather and a selection
extern "C" __global__ void select_rows_kernel(
    const int64* __restrict__ indices_ptr,  // [num_indices]
    const uint8* __restrict__ rows_ptr,     // [num_embeddings]: 1: the row may change
    int64* __restrict__ selected_ptr,       // [num_indices]: the id; -1: its row must not change
    int64 num_indices,
    int64 num_embeddings) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 index = indices_ptr[n];
  selected_ptr[n] = names_row(index, num_embeddings) && rows_ptr[index] ? index : -1;
}

// The update at the end of a run; addresses of a row in one table.
template <typename Weight, int VEC>
struct RowUpdate : Update<Weight, VEC> {
  using Acc = typename Accumulator<Weight>::type;
  enum : bool { ATOMIC_CARRY = false };
  // The row is read when its sum is complete.
  struct Row {};
  int64 row_stride;  // in elements
  int64 col_stride;  // in elements
  int64 D;

  __device__ Row load(int64, int64) const { return {}; }

  __device__ void operator()(int64 key, int64 d, const Vector<Acc, VEC>& total, int32, Row) const {
    this->update(key, key * row_stride + d * col_stride, key * D + d, d, total);
  }
};

// grid:  as segment_sum_kernel; block: 1-D
// owner: thread i of the grid: as segment_sum_kernel; of the rows, those whose runs end within its chunk
// why:   each row has one owner per column and step, so updates need no atomics
template <typename Value, typename Weight, int VEC, int UNROLL>
__global__ void row_update_kernel(
    const Value* __restrict__ values_ptr,  // [*, D], any strides (VEC > 1: column stride 1): the gradient
    const void* __restrict__ order_ptr,    // [num_keys]: each key's position before the sort
    const void* __restrict__ keys_ptr,     // [num_keys], sorted; keys outside [0, num_embeddings) are skipped
    Weight* weight_ptr,                    // [num_embeddings, D], any strides (VEC > 1: column stride 1)
    typename Accumulator<Weight>::type* state_ptr,                 // [num_embeddings, D], or null
    typename Accumulator<Weight>::type* second_state_ptr,          // [num_embeddings, D], or null
    typename Accumulator<Weight>::type* __restrict__ partial_ptr,  // [2 * num_chunks, D], by slot
    const double* __restrict__ lr_ptr,  // [1], multiplies step_size and decay; null: 1
    int64 num_keys,
    int64 num_embeddings,
    int64 chunk_size,
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
    int64 JOIN,  // 1: the second launch
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
  sum_runs<Value, Acc, VEC, false, UNROLL, false>(
      values_ptr, order_ptr, keys_ptr, nullptr, (const Weight*)nullptr, nullptr, partial_ptr, num_keys,
      num_embeddings, value_row_stride, value_col_stride, D, chunk_size, JOIN, order_bytes, key_bytes,
      0, update);
}

// grid:  cdiv(num_runs, blockDim.x); block: 1-D
// owner: thread i of the grid: run i, whose summed gradient lies in memory
// why:   "rowwise_adagrad": one thread sees the whole row: one pass for the mean square, one for the update
template <typename Weight, int VEC>
__global__ void rowwise_adagrad_kernel(
    const typename Accumulator<Weight>::type* __restrict__ total_ptr,  // [num_runs, D], contiguous
    const int64* __restrict__ keys_ptr,  // [num_runs]: each run's row; keys outside [0, num_embeddings) are skipped
    Weight* weight_ptr,                  // [num_embeddings, D], any strides (VEC > 1: column stride 1)
    typename Accumulator<Weight>::type* state_ptr,  // [num_embeddings]
    const double* __restrict__ lr_ptr,              // [1], multiplies step_size; null: 1
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
  update_by_mean_square<Weight, VEC>(
      total_ptr + run * D, weight_ptr + key * weight_row_stride, weight_col_stride, state_ptr + key,
      lr_ptr ? *lr_ptr : 1.0, step_size, eps, weight_decay, grad_scale, seed, step, key, D, STOCHASTIC_ROUNDING);
}
