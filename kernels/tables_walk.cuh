// The walk over the sorted rows of many tables of different widths, and a run's end as the caller wants it.

#pragma once

#include "common.cuh"

// What there is to know of a table; the host keeps one a row of an int64 tensor.
struct Table {
  int64 first_row;  // its first row's number
  int64 num_rows;
  int64 first_element;  // where it begins in the buffer
  int64 dim;
  int64 first_column;  // where its columns begin in the output
  int64 mode;          // 0 is a sum
  int64 padding_idx;   // -1: none
  int64 name;          // the number of its name
};

enum Mode { MEAN_MODE = 1, MAX_MODE = 2 };

// As walk_runs: thread i of the grid owns chunk i / (D / VEC), and of each table that has them the VEC columns from
// i % (D / VEC) * VEC on. It hands the sum of each run that is complete to end_run(key, element, d, total): the row's
// number, where in the buffer the columns lie, and which they are.
template <typename Value, typename Acc, int VEC, int UNROLL, typename Scale, typename EndRun>
__device__ inline void walk_table_runs(
    // [num_bags, *], any strides (VEC > 1: column stride 1): grad_output; or [num_keys, D]: the level below
    const Value* __restrict__ values_ptr,
    const void* __restrict__ order_ptr,   // [num_keys]: each key's position; null: a level of partial sums
    const void* __restrict__ keys_ptr,    // [num_keys], sorted; keys that name no row take no part
    const int32* __restrict__ key_tables_ptr,  // [num_keys]: each partial sum's table; null: no such level
    const void* __restrict__ sources_ptr,      // [positions]: bag b of table t is b * num_tables + t, -1: none
    const Scale* __restrict__ scales_ptr,      // one a position: multiplies its gradient; null: 1
    const int32* __restrict__ sizes_ptr,       // one a source: divides its gradient; null: 1. Not both
    const void* __restrict__ winner_ptr,  // [num_bags, *], contiguous: the position that is the maximum; or null
    const Table* __restrict__ tables_ptr,      // [num_tables]
    // [2 * num_chunks, D]: row 2c leads chunk c, row 2c + 1 trails it
    Acc* __restrict__ partial_values_ptr,
    int64* __restrict__ partial_keys_ptr,    // [2 * num_chunks]; -1: no such partial sum
    int32* __restrict__ partial_tables_ptr,  // [2 * num_chunks]
    int64 num_keys,
    int64 num_rows,  // of all tables
    int64 num_tables,
    int64 value_row_stride,   // in units of VEC elements
    int64 value_col_stride,   // in elements
    int64 winner_row_stride,  // columns of all tables
    int64 D,                  // of the widest table; VEC divides each one's
    int64 CHUNK,              // UNROLL divides it
    int64 order_bytes,
    int64 key_bytes,
    int64 source_bytes,
    int64 winner_bytes,
    const EndRun& end_run) {
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 chunk = thread / (D / VEC);
  const int64 d = thread % (D / VEC) * VEC;
  const int64 start = chunk * CHUNK;
  if (start >= num_keys) return;
  const int64 end = start + CHUNK < num_keys ? start + CHUNK : num_keys;
  const bool first_columns = d == 0;
  Acc* const lead_ptr = partial_values_ptr + 2 * chunk * D + d;
  Acc* const trail_ptr = lead_ptr + D;

  int64 key = load_integer(keys_ptr, start, key_bytes);
  // True while the run at hand began in an earlier chunk.
  bool leading = start > 0 && names_row(key, num_rows) &&
                 key == load_integer(keys_ptr, start - 1, key_bytes);
  if (first_columns) {
    partial_keys_ptr[2 * chunk] = leading ? key : -1;
    partial_keys_ptr[2 * chunk + 1] = -1;
  }

  Vector<Acc, VEC> total;
  set_zero(total);
  int32 table = 0;
  bool run_ends = false;
  for (int64 first = start; first < end; first += UNROLL) {
    // All loads of a step are issued before the first sum needs one.
    int64 next_key[UNROLL];
    int64 place[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64 position = first + u;
      next_key[u] = position + 1 < num_keys ? load_integer(keys_ptr, position + 1, key_bytes) : -1;
      place[u] =
          order_ptr && position < end ? load_integer(order_ptr, position, order_bytes) : position;
    }
    Vector<Value, VEC> value[UNROLL];
    Acc scale[UNROLL];
    int32 tables[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      set_zero(value[u]);
      scale[u] = 1;
      tables[u] = 0;
      if (first + u >= end || !names_row(u == 0 ? key : next_key[u - 1], num_rows)) continue;
      int64 row = place[u];
      int64 column = d;
      if (order_ptr) {
        const int64 source = load_integer(sources_ptr, place[u], source_bytes);
        row = source / num_tables;
        tables[u] = source % num_tables;
        column += tables_ptr[tables[u]].first_column;
        scale[u] = bag_scale<Acc>(scales_ptr, place[u], sizes_ptr, source);
      } else {
        tables[u] = key_tables_ptr[place[u]];
      }
      if (d >= tables_ptr[tables[u]].dim) continue;
      value[u] = *(const Vector<Value, VEC>*)(
          values_ptr + row * value_row_stride * VEC + column * value_col_stride);
      if (!winner_ptr || tables_ptr[tables[u]].mode != MAX_MODE) continue;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const int64 winner =
            load_integer(winner_ptr, row * winner_row_stride + column + i, winner_bytes);
        if (winner != place[u]) value[u].lane[i] = Value{};
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
        if (leading) {
          *(Vector<Acc, VEC>*)lead_ptr = total;
          if (first_columns) partial_tables_ptr[2 * chunk] = table;
        } else if (names_row(key, num_rows) && d < tables_ptr[table].dim) {
          const Table& owner = tables_ptr[table];
          end_run(key, owner.first_element + (key - owner.first_row) * owner.dim + d, d, total);
        }
        set_zero(total);
        leading = false;
      }
      key = next_key[u];
    }
  }

  // The run at hand goes on in the next chunk.
  if (end == num_keys || run_ends || !names_row(key, num_rows)) return;
  if (leading) {
    // A run that fills the whole chunk is its leading sum; a trailing zero keeps its keys adjacent.
    *(Vector<Acc, VEC>*)lead_ptr = total;
    if (first_columns) partial_tables_ptr[2 * chunk] = table;
    set_zero(total);
  }
  *(Vector<Acc, VEC>*)trail_ptr = total;
  if (first_columns) {
    partial_keys_ptr[2 * chunk + 1] = key;
    partial_tables_ptr[2 * chunk + 1] = table;
  }
}
