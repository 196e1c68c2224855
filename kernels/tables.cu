// Many tables, one launch: bags, rows and gradients of tables that lie one behind another in a buffer.
//
// Bags are table-major: the ids of bag b of table t lie from offsets[t * num_bags + b] up to the next offset. A row's
// number counts the rows of all tables before it too. Offsets are kept within the ids whatever they say.

#include "bag_range.cuh"
#include "common.cuh"
#include "tables_walk.cuh"

// The last of these ranges, each of so many bags, that begins at position n or before it.
__device__ inline int64 find_range(
    const void* offsets_ptr, int64 n, int64 num_ranges, int64 range_bags, int64 offset_bytes) {
  int64 low = 0;
  int64 high = num_ranges;
  while (high - low > 1) {
    const int64 middle = (low + high) / 2;
    const bool begun = load_integer(offsets_ptr, middle * range_bags, offset_bytes) <= n;
    low = begun ? middle : low;
    high = begun ? high : middle;
  }
  return low;
}

// The part of a bag that blockIdx.y owns.
__device__ inline Range split_range(Range range) {
  const int64 length = (range.end - range.begin + gridDim.y - 1) / gridDim.y;
  const int64 first = clamp(range.begin + blockIdx.y * length, range.begin, range.end);
  return {first, clamp(first + length, first, range.end)};
}

// Thread (i, s) of the grid owns vector i of the output and the s-th of as many equal parts of its bag as the grid is
// deep. So no thread idles, whatever the tables' widths; neighbours walk the same bag, or the next table's.
//
// Weight: of the tables. Output: the same; or, with SPLIT, what sums are taken in. Winner: int32 or int64.
// MAX: whether any table takes maxima, which are to be found; not with SPLIT.
template <typename Weight, typename Output, int VEC, bool MAX, bool SPLIT, int UNROLL>
__global__ void table_bag_kernel(
    const Weight* __restrict__ weight_ptr,              // the tables' buffer
    const void* __restrict__ indices_ptr,               // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,               // any integer dtype, [num_all_bags + 1]
    const Weight* __restrict__ per_sample_weights_ptr,  // [num_indices], contiguous; null: all 1
    const Table* __restrict__ tables_ptr,               // [num_tables]
    const int32* __restrict__ table_of_column_ptr,      // [D]
    Output* __restrict__ output_ptr,  // [num_bags, D]; SPLIT: [num_splits, num_bags, D]
    int64* __restrict__ sizes_ptr,    // SPLIT: as the output: what the parts divide by, in sum; null: nothing
    // int32 or int64 [num_bags, D]: the position that is the maximum, -1: none. MAX: written, or null; else read, as
    // what a table's maximum is to be, or null: no table has mode "max".
    void* __restrict__ winner_ptr,
    int64* record_ptr,                // [7], or null: do not record
    int32* flag_ptr,                  // [1], pinned host memory, or null
    int64 num_indices,
    int64 num_bags,  // of each table
    int64 num_all_bags,
    int64 D,  // of all tables together; VEC divides each one's
    int64 index_bytes,
    int64 offset_bytes,
    int64 winner_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 b = thread / (D / VEC);
  const int64 column = thread % (D / VEC) * VEC;
  if (b >= num_bags) return;
  const int64 t = table_of_column_ptr[column];
  const Table table = tables_ptr[t];
  if (column != table.first_column) record_ptr = nullptr;  // the first columns' thread records for all
  const Range range = load_range(
      offsets_ptr,
      t * num_bags + b,
      record_ptr,
      flag_ptr,
      num_indices,
      num_all_bags + 1,
      0,
      offset_bytes);
  const Range part = SPLIT ? split_range(range) : range;
  const Weight* const first_row = weight_ptr + table.first_element + column - table.first_column;

  Vector<Acc, VEC> total;
  set_zero(total);
  int64 size = 0;
  const bool is_max = table.mode == MAX_MODE;
  int64 winner[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    winner[i] = !MAX && is_max ? load_integer(winner_ptr, b * D + column + i, winner_bytes) : -1;
  }
  for (int64 step = part.begin; step < part.end; step += UNROLL) {
    // All loads of a step are issued before the first sum needs one.
    int64 index[UNROLL];
    Acc scale[UNROLL];
    Vector<Weight, VEC> value[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      index[u] = step + u < part.end ? load_integer(indices_ptr, step + u, index_bytes) : -1;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      set_zero(value[u]);
      scale[u] = 0;
      if (index[u] == table.padding_idx || !names_row(index[u], table.num_rows)) continue;
      value[u] = *(const Vector<Weight, VEC>*)(first_row + index[u] * table.dim);
      scale[u] = per_sample_weights_ptr ? widen(per_sample_weights_ptr[step + u]) : (Acc)1;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (step + u >= part.end || is_padding(index[u], table.padding_idx)) continue;
      ++size;
      if (record_ptr && !names_row(index[u], table.num_rows)) {
        record_out_of_range(
            record_ptr,
            flag_ptr,
            step + u,
            index[u],
            table.num_rows,
            b + 1,
            range.begin,
            table.name);
      }
      if (is_max && !names_row(index[u], table.num_rows)) continue;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const Acc wide = widen(value[u].lane[i]);
        if (!is_max) {
          total.lane[i] += wide * scale[u];
          // Not `>=`, so that the first of equals stays, and so does a NaN that came first.
        } else if (MAX ? winner[i] < 0 || wide > total.lane[i] : winner[i] == step + u) {
          total.lane[i] = wide;
          winner[i] = step + u;
        }
      }
    }
  }

  if (table.mode != MEAN_MODE) size = blockIdx.y == 0;
  const int64 out = (SPLIT ? blockIdx.y * num_bags + b : b) * D + column;
  Vector<Output, VEC> output;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    if (SPLIT && sizes_ptr) sizes_ptr[out + i] = size;
    if (MAX && winner_ptr) store_integer(winner_ptr, out + i, winner[i], winner_bytes);
    narrow(
        !SPLIT && table.mode == MEAN_MODE ? total.lane[i] / (Acc)(size > 0 ? size : 1) : total.lane[i],
        output.lane[i]);
  }
  *(Vector<Output, VEC>*)(output_ptr + out) = output;
}

// Thread i of the grid owns word i of the output, and where there are fewer threads than offsets, its share of them.
template <typename Word>
__global__ void table_gather_kernel(
    const Word* __restrict__ weight_ptr,   // [rows of all tables, D], contiguous
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,  // any integer dtype, [num_all_bags + 1]
    const Table* __restrict__ tables_ptr,  // [num_tables]
    Word* __restrict__ output_ptr,         // [num_indices, D]
    int64* record_ptr,                     // [7], or null: do not record
    int32* flag_ptr,                       // [1], pinned host memory, or null
    int64 num_indices,
    int64 num_bags,  // of each table
    int64 num_all_bags,
    int64 num_tables,
    int64 zero_padding,  // whether rows of each table's padding become zero
    int64 D,             // words a row
    int64 index_bytes,
    int64 offset_bytes) {
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (record_ptr) {
    const int64 num_threads = (int64)gridDim.x * blockDim.x;
    for (int64 place = thread; place <= num_all_bags; place += num_threads) {
      const int64 offset = load_integer(offsets_ptr, place, offset_bytes);
      const int64 before = place > 0 ? load_integer(offsets_ptr, place - 1, offset_bytes) : 0;
      if (offset < before || offset > num_indices || (place == 0 && offset != 0)) {
        record_out_of_range(record_ptr, flag_ptr, place, offset, num_indices, -1, 0);
      }
    }
  }
  const int64 n = thread / D;
  if (n >= num_indices) return;
  const int64 index = load_integer(indices_ptr, n, index_bytes);
  const int64 t = find_range(offsets_ptr, n, num_tables, num_bags, offset_bytes);
  const bool in_bag = n < load_integer(offsets_ptr, num_all_bags, offset_bytes);
  const bool in_table = names_row(index, tables_ptr[t].num_rows);
  Word value{};
  if (in_bag && in_table && !(zero_padding && index == tables_ptr[t].padding_idx)) {
    value = weight_ptr[(tables_ptr[t].first_row + index) * D + thread % D];
  }
  output_ptr[thread] = value;
  if (record_ptr && in_bag && !in_table && thread % D == 0) {
    const int64 bag = find_range(offsets_ptr, n, num_all_bags, 1, offset_bytes);
    const int64 begin = bag == 0 ? 0 : load_integer(offsets_ptr, bag, offset_bytes);
    record_out_of_range(
        record_ptr,
        flag_ptr,
        n,
        index,
        tables_ptr[t].num_rows,
        bag - t * num_bags + 1,
        begin,
        tables_ptr[t].name);
  }
}

// Thread i of the grid owns position i.
extern "C" __global__ void table_keys_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,  // any integer dtype, [num_all_bags + 1]
    const Table* __restrict__ tables_ptr,  // [num_tables]
    void* __restrict__ keys_ptr,           // [num_indices]: the row of each id, num_rows: none; or null
    // [num_indices]: bag b of table t is b * num_tables + t, -1: no bag; or null
    void* __restrict__ sources_ptr,
    int32* sizes_ptr,  // [num_all_bags], zero on entry: what divides the gradient of each source; or null
    int64 num_indices,
    int64 num_bags,  // of each table
    int64 num_all_bags,
    int64 num_tables,
    int64 num_rows,  // of all tables
    int64 index_bytes,
    int64 offset_bytes,
    int64 key_bytes,
    int64 source_bytes) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const bool in_bag = n < load_integer(offsets_ptr, num_all_bags, offset_bytes);
  const int64 index = load_integer(indices_ptr, n, index_bytes);
  int64 bag = 0;
  int64 t;
  if (sources_ptr) {
    bag = find_range(offsets_ptr, n, num_all_bags, 1, offset_bytes);
    t = bag / num_bags;
  } else {
    t = find_range(offsets_ptr, n, num_tables, num_bags, offset_bytes);
  }
  const Table table = tables_ptr[t];
  const bool counted = in_bag && !is_padding(index, table.padding_idx);
  if (keys_ptr) {
    const bool kept = counted && names_row(index, table.num_rows);
    // Ids without a gradient sort behind all others.
    store_integer(keys_ptr, n, kept ? table.first_row + index : num_rows, key_bytes);
  }
  if (!sources_ptr) return;
  const int64 source = bag % num_bags * num_tables + t;
  store_integer(sources_ptr, n, in_bag ? source : -1, source_bytes);
  if (!sizes_ptr || !in_bag) return;
  // The first position of a bag adds all of them, so that the others need not queue at one address.
  const bool is_mean = table.mode == MEAN_MODE;
  int64 size = is_mean && !counted ? -1 : 0;
  const int64 begin = bag == 0 ? 0 : load_integer(offsets_ptr, bag, offset_bytes);
  if (n == begin) {
    size += is_mean ? load_integer(offsets_ptr, bag + 1, offset_bytes) - begin : 1;
  }
  if (size != 0) atomicAdd(sizes_ptr + source, (int32)size);
}

// Thread (i, s) of the grid owns vector i of grad_output, which it adds to each row of the s-th part of its bag.
template <typename Grad, int VEC, int UNROLL>
__global__ void table_scatter_add_kernel(
    const Grad* __restrict__ grad_output_ptr,  // [num_bags, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,      // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,      // any integer dtype, [num_all_bags + 1]
    const Grad* __restrict__ per_sample_weights_ptr,  // [num_indices], contiguous; null: all 1
    const void* __restrict__ winner_ptr,  // [num_bags, D]: the position that is the maximum; null: no such table
    const Table* __restrict__ tables_ptr,             // [num_tables]
    const int32* __restrict__ table_of_column_ptr,    // [D]
    Grad* grad_weight_ptr,                            // the tables' buffer, zero on entry
    int64 num_indices,
    int64 num_bags,  // of each table
    int64 num_all_bags,
    int64 grad_row_stride,  // in units of VEC elements
    int64 grad_col_stride,  // in elements
    int64 D,                // of all tables together; VEC divides each one's
    int64 index_bytes,
    int64 offset_bytes,
    int64 winner_bytes) {
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 b = thread / (D / VEC);
  const int64 column = thread % (D / VEC) * VEC;
  if (b >= num_bags) return;
  const int64 t = table_of_column_ptr[column];
  const Table table = tables_ptr[t];
  const Range range = load_range(
      offsets_ptr,
      t * num_bags + b,
      nullptr,
      nullptr,
      num_indices,
      num_all_bags + 1,
      0,
      offset_bytes);
  const Range part = split_range(range);
  Grad* const first_row = grad_weight_ptr + table.first_element + column - table.first_column;
  Vector<Grad, VEC> grad = *(const Vector<Grad, VEC>*)(
      grad_output_ptr + b * grad_row_stride * VEC + column * grad_col_stride);
  int64 winner[VEC];
  const bool is_max = winner_ptr && table.mode == MAX_MODE;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    winner[i] = is_max ? load_integer(winner_ptr, b * D + column + i, winner_bytes) : -1;
  }
  if (table.mode == MEAN_MODE) {
    int64 size = 0;
    for (int64 n = range.begin; n < range.end; ++n) {
      size += !is_padding(load_integer(indices_ptr, n, index_bytes), table.padding_idx);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) grad.lane[i] /= (Grad)(size > 0 ? size : 1);
  }
  for (int64 step = part.begin; step < part.end; step += UNROLL) {
    int64 index[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      index[u] = step + u < part.end ? load_integer(indices_ptr, step + u, index_bytes) : -1;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (index[u] == table.padding_idx || !names_row(index[u], table.num_rows)) continue;
      Vector<Grad, VEC> value = grad;
      if (is_max) {
        // One by one, as few of them have won.
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          if (winner[i] == step + u) atomicAdd(first_row + index[u] * table.dim + i, grad.lane[i]);
        }
        continue;
      }
      if (per_sample_weights_ptr) {
        const Grad scale = per_sample_weights_ptr[step + u];
#pragma unroll
        for (int i = 0; i < VEC; ++i) value.lane[i] *= scale;
      }
      atomic_add_vector(first_row + index[u] * table.dim, value);
    }
  }
}

// Stores the sum, rounded once.
template <typename Grad, int VEC>
struct StoreTableGradient {
  using Acc = typename Accumulator<Grad>::type;
  Grad* grad_weight_ptr;

  __device__ void operator()(int64, int64 element, int64, const Vector<Acc, VEC>& total) const {
    Vector<Grad, VEC> row;
#pragma unroll
    for (int i = 0; i < VEC; ++i) narrow(total.lane[i], row.lane[i]);
    *(Vector<Grad, VEC>*)(grad_weight_ptr + element) = row;
  }
};

// As segment_sum_kernel, for tables of different widths.
template <typename Value, typename Grad, int VEC, int UNROLL>
__global__ void table_segment_sum_kernel(
    // [num_bags, *], any strides (VEC > 1: column stride 1): grad_output; or [num_keys, D]: the level below
    const Value* __restrict__ values_ptr,
    const void* __restrict__ order_ptr,   // [num_keys]: each key's position; null: a level of partial sums
    const void* __restrict__ keys_ptr,    // [num_keys], sorted; keys that name no row take no part
    const int32* __restrict__ key_tables_ptr,  // [num_keys]: each partial sum's table; null: no such level
    const void* __restrict__ sources_ptr,      // [positions]: bag b of table t is b * num_tables + t, -1: none
    const Grad* __restrict__ per_sample_weights_ptr,  // one a position; null: 1
    const int32* __restrict__ sizes_ptr,              // one a source; null: 1
    const void* __restrict__ winner_ptr,  // [num_bags, *], contiguous: the position that is the maximum; or null
    const Table* __restrict__ tables_ptr,             // [num_tables]
    Grad* __restrict__ grad_weight_ptr,               // the tables' buffer, zero on entry
    // [2 * num_chunks, D]: row 2c leads chunk c, row 2c + 1 trails it
    typename Accumulator<Grad>::type* __restrict__ partial_values_ptr,
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
    int64 winner_bytes) {
  using Acc = typename Accumulator<Grad>::type;
  walk_table_runs<Value, Acc, VEC, UNROLL>(
      values_ptr, order_ptr, keys_ptr, key_tables_ptr, sources_ptr, per_sample_weights_ptr, sizes_ptr,
      winner_ptr, tables_ptr, partial_values_ptr, partial_keys_ptr, partial_tables_ptr, num_keys,
      num_rows, num_tables, value_row_stride, value_col_stride, winner_row_stride, D, CHUNK,
      order_bytes, key_bytes, source_bytes, winner_bytes,
      StoreTableGradient<Grad, VEC>{grad_weight_ptr});
}

// Thread i of the grid owns position i: the inner product of its row and its bag's gradient.
template <typename Weight, int VEC>
__global__ void table_sample_weights_kernel(
    const Weight* __restrict__ grad_output_ptr,  // [num_bags, *], any strides; VEC > 1: column stride 1
    const Weight* __restrict__ weight_ptr,       // the tables' buffer
    const void* __restrict__ keys_ptr,           // [num_indices]: the row of each position; num_rows: none
    const void* __restrict__ sources_ptr,        // [num_indices]: bag b of table t is b * num_tables + t
    const Table* __restrict__ tables_ptr,        // [num_tables]
    Weight* __restrict__ grad_ptr,               // [num_indices]
    int64 num_indices,
    int64 num_rows,  // of all tables
    int64 num_tables,
    int64 grad_row_stride,  // in units of VEC elements
    int64 grad_col_stride,  // in elements
    int64 key_bytes,
    int64 source_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 key = load_integer(keys_ptr, n, key_bytes);
  const int64 source = load_integer(sources_ptr, n, source_bytes);
  Acc total = 0;
  if (source >= 0 && key < num_rows) {
    const Table table = tables_ptr[source % num_tables];
    const Weight* const grad_row = grad_output_ptr + source / num_tables * grad_row_stride * VEC +
                                   table.first_column * grad_col_stride;
    const Weight* const row =
        weight_ptr + table.first_element + (key - table.first_row) * table.dim;
#pragma unroll 4
    for (int64 d = 0; d < table.dim; d += VEC) {
      const auto grad = *(const Vector<Weight, VEC>*)(grad_row + d * grad_col_stride);
      const auto value = *(const Vector<Weight, VEC>*)(row + d);
#pragma unroll
      for (int i = 0; i < VEC; ++i) total += widen(grad.lane[i]) * widen(value.lane[i]);
    }
  }
  narrow(total, grad_ptr[n]);
}
