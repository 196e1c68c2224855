// One optimizer step on rows of many tables of different widths: a walk over all of them that ends in updates.
//
// What table_segment_sum_kernel is to segment_sum_kernel, this is to row_update_kernel. Weight and state are buffers
// in which the tables lie alike; the state of row-wise Adagrad is one number a row, of all tables' rows.

#include "common.cuh"
#include "tables_walk.cuh"
#include "update.cuh"

// Where a row of one of the tables lies.
template <typename Weight, int VEC>
struct TableRowUpdate : Update<Weight, VEC> {
  using Acc = typename Accumulator<Weight>::type;

  __device__ void operator()(
      int64 key, int64 element, int64 d, const Vector<Acc, VEC>& total) const {
    this->update(key, element, element, d, total);
  }
};

// The grid, the walk and the levels are those of table_segment_sum_kernel.
template <typename Value, typename Weight, int VEC, int UNROLL>
__global__ void table_row_update_kernel(
    // [num_bags, *], any strides (VEC > 1: column stride 1): grad_output; or [num_keys, D]: the level below
    const Value* __restrict__ values_ptr,
    const void* __restrict__ order_ptr,  // [num_keys]: each key's entry; null: a level of partial sums
    const void* __restrict__ keys_ptr,   // [num_keys], sorted; keys that name no row take no part
    const int32* __restrict__ key_tables_ptr,  // [num_keys]: each partial sum's table; null: no such level
    const void* __restrict__ sources_ptr,      // [entries]: bag b of table t is b * num_tables + t
    const typename Accumulator<Weight>::type* __restrict__ scales_ptr,  // one an entry; null: 1
    const void* __restrict__ winner_ptr,  // [num_bags, *], contiguous: the entry that is the maximum; or null
    const Table* __restrict__ tables_ptr,                  // [num_tables]
    Weight* weight_ptr,                                    // the tables' buffer
    typename Accumulator<Weight>::type* state_ptr,         // as the buffer, or null
    typename Accumulator<Weight>::type* second_state_ptr,  // as the buffer, or null
    // [2 * num_chunks, D]: row 2c leads chunk c, row 2c + 1 trails it
    typename Accumulator<Weight>::type* __restrict__ partial_values_ptr,
    int64* __restrict__ partial_keys_ptr,    // [2 * num_chunks]; -1: no such partial sum
    int32* __restrict__ partial_tables_ptr,  // [2 * num_chunks]
    const double* __restrict__ lr_ptr,       // [1]: multiplies step_size and decay; null: 1
    int64 num_keys,
    int64 num_rows,
    int64 num_tables,
    int64 value_row_stride,   // in units of VEC elements
    int64 value_col_stride,   // in elements
    int64 winner_row_stride,  // columns of all tables
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
    int64 D,  // of the widest table; VEC divides each one's
    int64 FORMULA,
    int64 STOCHASTIC_ROUNDING,
    int64 CHUNK,  // UNROLL divides it
    int64 order_bytes,
    int64 key_bytes,
    int64 source_bytes,
    int64 winner_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const double lr = lr_ptr ? *lr_ptr : 1.0;
  const TableRowUpdate<Weight, VEC> update = {
      {weight_ptr, state_ptr, second_state_ptr, FORMULA, (Acc)(step_size * lr),
       (Acc)(1.0 - decay * lr), (Acc)eps, (Acc)avg_weight, (Acc)sq_weight, (Acc)momentum,
       (Acc)weight_decay, (Acc)grad_scale,
       STOCHASTIC_ROUNDING, seed, step}};
  walk_table_runs<Value, Acc, VEC, UNROLL>(
      values_ptr, order_ptr, keys_ptr, key_tables_ptr, sources_ptr, scales_ptr, nullptr, winner_ptr,
      tables_ptr, partial_values_ptr, partial_keys_ptr, partial_tables_ptr, num_keys, num_rows,
      num_tables, value_row_stride, value_col_stride, winner_row_stride, D, CHUNK, order_bytes,
      key_bytes, source_bytes, winner_bytes, update);
}

// Thread i of the grid owns run i, whose summed gradient lies in memory: it sees the row as a whole.
template <typename Weight>
__global__ void table_rowwise_adagrad_kernel(
    const typename Accumulator<Weight>::type* __restrict__ total_ptr,  // [num_runs, D], contiguous
    const int64* __restrict__ keys_ptr,    // [num_runs]: the row of each; others than rows take no part
    const Table* __restrict__ tables_ptr,  // [num_tables]
    Weight* weight_ptr,                    // the tables' buffer
    typename Accumulator<Weight>::type* state_ptr,  // [num_rows]
    const double* __restrict__ lr_ptr,              // [1]: multiplies step_size; null: 1
    int64 num_rows,
    int64 num_tables,
    double step_size,
    double eps,
    double weight_decay,
    double grad_scale,
    int64 seed,
    int64 step,
    int64 D,  // of the widest table
    int64 STOCHASTIC_ROUNDING,
    int64 num_runs) {
  const int64 run = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (run >= num_runs || !names_row(keys_ptr[run], num_rows)) return;
  const int64 key = keys_ptr[run];
  // The last table that begins at the row or before it; tables without rows come before the one that has it.
  int64 t = 0;
  int64 end = num_tables;
  while (end - t > 1) {
    const int64 middle = (t + end) / 2;
    const bool begun = tables_ptr[middle].first_row <= key;
    t = begun ? middle : t;
    end = begun ? end : middle;
  }
  const Table table = tables_ptr[t];
  update_by_mean_square(
      total_ptr + run * D, weight_ptr + table.first_element + (key - table.first_row) * table.dim,
      1, state_ptr + key, lr_ptr ? *lr_ptr : 1.0, step_size, eps, weight_decay, grad_scale, seed, step, key,
      table.dim, STOCHASTIC_ROUNDING);
}
