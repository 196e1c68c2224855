// Optimizer step on rows of many tables: the walk of table_segment_sum_kernel, ending in updates as in row_update.cu.
//
// Weight and state are buffers with the same layout. Row-wise Adagrad's state is one number per row of all tables.
// Entry n's gradient is columns of table t in row b of values, where output_bag[n] = b * num_tables + t.

#include "common.cuh"
#include "tables_walk.cuh"
#include "update.cuh"

// The update at the end of a run; weight and state share a row's offset.
template <typename Weight, int VEC>
struct TableRowUpdate : Update<Weight, VEC> {
  using Acc = typename Accumulator<Weight>::type;
  // The row is read when its sum is complete.
  struct Row {};

  __device__ Row load(int64) const { return {}; }

  __device__ void operator()(
      int64 key, int64 element, int64 d, const Vector<Acc, VEC>& total, Row) const {
    this->update(key, element, element, d, total);
  }
};

// grid:  as table_segment_sum_kernel; block: 1-D
// owner: thread i of the grid: as table_segment_sum_kernel; of the rows, those whose runs end within its chunk
// why:   each row has one owner per column and step, so updates need no atomics
template <typename Value, typename Weight, int VEC, int UNROLL>
__global__ void table_row_update_kernel(
    const Value* __restrict__ values_ptr,   // grad_output, [num_bags, *], any strides (VEC > 1: column stride 1)
    const void* __restrict__ order_ptr,     // [num_keys]: each key's entry before the sort
    const void* __restrict__ keys_ptr,      // [num_keys], sorted row numbers; keys outside [0, num_rows) are skipped
    const void* __restrict__ output_bag_ptr,   // [entries]: b * num_tables + t
    const typename Accumulator<Weight>::type* __restrict__ scales_ptr,  // [entries]; null: all 1
    const void* __restrict__ max_positions_ptr,            // [num_bags, *], contiguous: the argmax as an entry; or null
    const Table* __restrict__ tables_ptr,                  // [num_tables]
    Weight* weight_ptr,                                    // the tables' buffer
    typename Accumulator<Weight>::type* state_ptr,         // as the buffer, or null
    typename Accumulator<Weight>::type* second_state_ptr,  // as the buffer, or null
    typename Accumulator<Weight>::type* __restrict__ partial_ptr,  // [2 * num_chunks, D], by slot
    const double* __restrict__ lr_ptr,  // [1], multiplies step_size and decay; null: 1
    int64 num_keys,
    int64 num_rows,
    int64 num_tables,
    int64 chunk_size,
    int64 value_row_stride,         // in units of VEC elements
    int64 value_col_stride,         // in elements
    int64 max_position_row_stride,  // total columns of all tables
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
    int64 D,  // the widest table's; VEC divides each one's
    int64 FORMULA,
    int64 STOCHASTIC_ROUNDING,
    int64 JOIN,  // 1: the second launch
    int64 order_bytes,
    int64 key_bytes,
    int64 output_bag_bytes,
    int64 max_position_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const double lr = lr_ptr ? *lr_ptr : 1.0;
  const TableRowUpdate<Weight, VEC> update = {
      {weight_ptr, state_ptr, second_state_ptr, FORMULA, (Acc)(step_size * lr),
       (Acc)(1.0 - decay * lr), (Acc)eps, (Acc)avg_weight, (Acc)sq_weight, (Acc)momentum,
       (Acc)weight_decay, (Acc)grad_scale,
       STOCHASTIC_ROUNDING, seed, step}};
  sum_table_runs<Value, Acc, VEC, UNROLL>(
      values_ptr, order_ptr, keys_ptr, output_bag_ptr, scales_ptr, nullptr, max_positions_ptr,
      tables_ptr, partial_ptr, num_keys, num_rows,
      num_tables, value_row_stride, value_col_stride, max_position_row_stride, D, chunk_size, JOIN, order_bytes,
      key_bytes, output_bag_bytes, max_position_bytes, update);
}

// grid:  cdiv(num_runs, blockDim.x); block: 1-D
// owner: thread i of the grid: run i, whose summed gradient lies in memory
// why:   "rowwise_adagrad": one thread sees the whole row: one pass for the mean square, one for the update
template <typename Weight, int VEC>
__global__ void table_rowwise_adagrad_kernel(
    const typename Accumulator<Weight>::type* __restrict__ total_ptr,  // [num_runs, D], contiguous
    const int64* __restrict__ keys_ptr,    // [num_runs]: each run's row; keys outside [0, num_rows) are skipped
    const Table* __restrict__ tables_ptr,  // [num_tables]
    Weight* weight_ptr,                    // the tables' buffer
    typename Accumulator<Weight>::type* state_ptr,  // [num_rows]
    const double* __restrict__ lr_ptr,              // [1], multiplies step_size; null: 1
    int64 num_rows,
    int64 num_tables,
    double step_size,
    double eps,
    double weight_decay,
    double grad_scale,
    int64 seed,
    int64 step,
    int64 D,  // the widest table's
    int64 STOCHASTIC_ROUNDING,
    int64 num_runs) {
  const int64 run = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (run >= num_runs || !names_row(keys_ptr[run], num_rows)) return;
  const int64 key = keys_ptr[run];
  // Binary search: the last table with first_row <= key; empty tables precede the one that has the row.
  int64 t = 0;
  int64 end = num_tables;
  while (end - t > 1) {
    const int64 middle = (t + end) / 2;
    const bool begun = tables_ptr[middle].first_row <= key;
    t = begun ? middle : t;
    end = begun ? end : middle;
  }
  const Table table = tables_ptr[t];
  update_by_mean_square<Weight, VEC>(
      total_ptr + run * D, weight_ptr + table.first_element + (key - table.first_row) * table.dim,
      1, state_ptr + key, lr_ptr ? *lr_ptr : 1.0, step_size, eps, weight_decay, grad_scale, seed, step, key,
      table.dim, STOCHASTIC_ROUNDING);
}
