// The walk and the join of segment_walk.cuh for tables of different widths. EndRun: functor as there.

#pragma once

#include "common.cuh"
#include "segment_walk.cuh"

// A row of tables_ptr; the copies in gpu_embed/tables/layout.py and table_columns.py must agree.
struct Table {
  int64 first_row;  // number of the first row
  int64 num_rows;
  int64 first_element;  // offset in the buffer
  int64 dim;
  int64 first_column;  // offset in the output's rows
  int64 mode;          // 0: sum
  int64 padding_idx;   // -1: none
  int64 name;          // number of the name, for the bounds record
};

enum Mode { MEAN_MODE = 1, MAX_MODE = 2 };

// As sum_runs. Thread i of the grid owns chunk i / (D / VEC) and, of each table that has them, the VEC columns from
// i % (D / VEC) * VEC on. A complete run's sum goes to end_run(key, element, d, total, end_run.load(element));
// element: the columns' offset in the buffer.
template <typename Value, typename Acc, int VEC, int UNROLL, typename Scale, typename EndRun>
__device__ inline void sum_table_runs(
    const Value* __restrict__ values_ptr,    // grad_output, [num_bags, *], any strides (VEC > 1: column stride 1)
    const void* __restrict__ order_ptr,      // [num_keys]: each key's position before the sort
    const void* __restrict__ keys_ptr,       // [num_keys], sorted row numbers; keys outside [0, num_rows) are skipped
    const void* __restrict__ output_bag_ptr,     // [num_indices]: b * num_tables + t, -1: in no bag
    const Scale* __restrict__ scales_ptr,      // [num_indices]; null: all 1
    const int32* __restrict__ sizes_ptr,       // by output bag: the divisors of means; null: all 1. Not with scales
    const void* __restrict__ max_positions_ptr,  // [num_bags, *], contiguous: the argmax as a position; or null
    const Table* __restrict__ tables_ptr,        // [num_tables]
    Acc* __restrict__ partial_ptr,               // [2 * num_chunks, D], by slot
    int64 num_keys,
    int64 num_rows,  // of all tables
    int64 num_tables,
    int64 value_row_stride,         // in units of VEC elements
    int64 value_col_stride,         // in elements
    int64 max_position_row_stride,  // total columns of all tables
    int64 D,                        // the widest table's; VEC divides each one's
    int64 chunk_size,
    int64 join,
    int64 order_bytes,
    int64 key_bytes,
    int64 output_bag_bytes,
    int64 max_position_bytes,
    const EndRun& end_run) {
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 chunk = thread / (D / VEC);
  const int64 d = thread % (D / VEC) * VEC;
  const int64 start = chunk * chunk_size;
  if (start >= num_keys) return;
  const auto element_of = [&](int64 key, const Table& owner) {
    return owner.first_element + (key - owner.first_row) * owner.dim + d;
  };
  if (join) {
    if (!begins_crossing_run(keys_ptr, chunk, chunk_size, num_keys, num_rows, key_bytes)) return;
    const int64 last = start + chunk_size - 1;
    const int64 n = load_integer(order_ptr, last, order_bytes);
    const int64 output_bag = load_integer(output_bag_ptr, n, output_bag_bytes);
    const Table& owner = tables_ptr[output_bag % num_tables];
    if (d >= owner.dim) return;
    const int64 key = load_key(keys_ptr, last, key_bytes);
    const int64 element = element_of(key, owner);
    const typename EndRun::Row old = end_run.load(element);
    const Vector<Acc, VEC> total = join_carries<Acc, VEC, UNROLL>(
        keys_ptr, partial_ptr, nullptr, chunk, chunk_size, num_keys, d, D, key_bytes, nullptr);
    end_run(key, element, d, total, old);
    return;
  }
  const int64 end = start + chunk_size < num_keys ? start + chunk_size : num_keys;
  Acc* const carry_in_ptr = partial_ptr + 2 * chunk * D + d;

  int64 key = load_key(keys_ptr, start, key_bytes);
  // A chunk that begins with a sentinel holds nothing else.
  if (!names_row(key, num_rows)) return;
  // True while the current run began in an earlier chunk.
  bool carried = start > 0 && key == load_key(keys_ptr, start - 1, key_bytes);

  Vector<Acc, VEC> total;
  set_zero(total);
  int32 table = 0;
  bool run_ends = false;
  for (int64 first = start; first < end; first += UNROLL) {
    // All loads of a step are issued before the first addition.
    int64 next_key[UNROLL];
    int64 n[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64 position = first + u;
      next_key[u] = position + 1 < num_keys ? load_key(keys_ptr, position + 1, key_bytes) : -1;
      n[u] = position < end ? load_integer(order_ptr, position, order_bytes) : 0;
    }
    // In two steps: in one, NVRTC would copy the code behind each branch, tenfold.
    int64 row[UNROLL];
    int32 tables[UNROLL];
    Acc scale[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      row[u] = -1;
      tables[u] = 0;
      scale[u] = 1;
      if (first + u >= end || !names_row(u == 0 ? key : next_key[u - 1], num_rows)) continue;
      const int64 output_bag = load_integer(output_bag_ptr, n[u], output_bag_bytes);
      row[u] = output_bag / num_tables;
      tables[u] = output_bag % num_tables;
      scale[u] = bag_scale<Acc>(scales_ptr, n[u], sizes_ptr, output_bag);
    }
    Vector<Value, VEC> value[UNROLL];
    typename EndRun::Row old[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      set_zero(value[u]);
      const Table& owner = tables_ptr[tables[u]];
      if (row[u] < 0 || d >= owner.dim) continue;
      const int64 column = d + owner.first_column;
      value[u] = *(const Vector<Value, VEC>*)(
          values_ptr + row[u] * value_row_stride * VEC + column * value_col_stride);
      const int64 key_here = u == 0 ? key : next_key[u - 1];
      // A run that began in an earlier chunk is that chunk's.
      if (key_here != next_key[u] && !(carried && key_here == key)) {
        old[u] = end_run.load(element_of(key_here, owner));
      }
      if (!max_positions_ptr || owner.mode != MAX_MODE) continue;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const int64 argmax = load_integer(
            max_positions_ptr, row[u] * max_position_row_stride + column + i, max_position_bytes);
        if (argmax != n[u]) value[u].lane[i] = Value{};
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (first + u >= end) break;
#pragma unroll
      for (int i = 0; i < VEC; ++i) total.lane[i] += widen(value[u].lane[i]) * scale[u];
      table = tables[u];
      run_ends = key != next_key[u];
      if (run_ends) {
        if (carried) {
          *(Vector<Acc, VEC>*)carry_in_ptr = total;
        } else if (names_row(key, num_rows) && d < tables_ptr[table].dim) {
          end_run(key, element_of(key, tables_ptr[table]), d, total, old[u]);
        }
        set_zero(total);
        carried = false;
      }
      key = next_key[u];
    }
  }

  // The last run goes on in the next chunk. One that fills the chunk is its carry-in.
  if (end == num_keys || run_ends || !names_row(key, num_rows)) return;
  *(Vector<Acc, VEC>*)(carried ? carry_in_ptr : carry_in_ptr + D) = total;
}
