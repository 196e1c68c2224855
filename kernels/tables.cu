// Many tables, one launch: bags, rows and gradients of tables of different widths that share one buffer.
//
// Bags are table-major: bag b of table t begins at offsets[t * num_bags + b], clamped as in bag.cu. Output bag
// b * num_tables + t is the columns of table t in row b of the output. Row numbers (keys) count through all tables.

#include "bag_range.cuh"
#include "common.cuh"
#include "tables_walk.cuh"

// Binary search: the last range of range_bags bags that begins at or before position n.
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

// Split blockIdx.y of gridDim.y of a bag.
__device__ inline Range split_range(Range range) {
  const int64 length = (range.end - range.begin + gridDim.y - 1) / gridDim.y;
  const int64 first = clamp(range.begin + blockIdx.y * length, range.begin, range.end);
  return {first, clamp(first + length, first, range.end)};
}

// grid:  (cdiv(num_bags * D / VEC, blockDim.x), num_splits); block: 1-D
// owner: thread (i, s) of the grid: vector i of the flattened output, split s of num_splits of its bag
// why:   no thread idles, whatever the tables' widths; adjacent threads read adjacent columns of the same rows:
//        coalesced
//
// Output: Weight; SPLIT: its accumulation dtype. MAX: some table has mode "max", and its argmax is to be found; not
// with SPLIT.
template <typename Weight, typename Output, int VEC, bool MAX, bool SPLIT, int UNROLL>
__global__ void table_bag_kernel(
    const Weight* __restrict__ weight_ptr,              // the tables' buffer
    const void* __restrict__ indices_ptr,               // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,               // any integer dtype, [num_all_bags + 1]
    const Weight* __restrict__ per_sample_weights_ptr,  // [num_indices], contiguous; null: all 1
    const Table* __restrict__ tables_ptr,               // [num_tables]
    const int32* __restrict__ table_of_column_ptr,      // [D]
    Output* __restrict__ output_ptr,                    // [num_bags, D]; SPLIT: partial sums, [num_splits, num_bags, D]
    int64* __restrict__ sizes_ptr,  // SPLIT: [num_splits, num_bags, D]: each split's share of the divisor; or null
    // int32 or int64 [num_bags, D]: the argmax as a position, -1: none. MAX: an output; null: not wanted. Else an
    // input, the argmax of an earlier launch; null: no table has mode "max". Never both, so one argument serves.
    void* __restrict__ max_positions_ptr,
    int64* record_ptr,  // [7]; null: do not record
    int32* flag_ptr,    // [1], pinned host memory; null: do not record
    int64 num_indices,
    int64 num_bags,  // per table
    int64 num_all_bags,
    int64 D,  // total of all tables; VEC divides each one's
    int64 index_bytes,
    int64 offset_bytes,
    int64 max_position_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 b = thread / (D / VEC);
  const int64 column = thread % (D / VEC) * VEC;
  if (b >= num_bags) return;
  const int64 t = table_of_column_ptr[column];
  const Table table = tables_ptr[t];
  if (column != table.first_column) record_ptr = nullptr;  // the thread of the first columns records
  const Range range = load_range(
      offsets_ptr, t * num_bags + b, record_ptr, flag_ptr, num_indices, num_all_bags + 1, 0, offset_bytes);
  const Range part = SPLIT ? split_range(range) : range;
  const Weight* const first_row = weight_ptr + table.first_element + column - table.first_column;

  Vector<Acc, VEC> total;
  set_zero(total);
  int64 size = 0;
  const bool is_max = table.mode == MAX_MODE;
  int64 argmax[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    argmax[i] = !MAX && is_max ? load_integer(max_positions_ptr, b * D + column + i, max_position_bytes) : -1;
  }
  for (int64 step = part.begin; step < part.end; step += UNROLL) {
    // All loads of a step are issued before the first addition.
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
            record_ptr, flag_ptr, step + u, index[u], table.num_rows, b + 1, range.begin, table.name);
      }
      if (is_max && !names_row(index[u], table.num_rows)) continue;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const Acc wide = widen(value[u].lane[i]);
        if (!is_max) {
          total.lane[i] += wide * scale[u];
          // `>`, not `>=`: the first of equals stays, as does a NaN in the bag's first row.
        } else if (MAX ? argmax[i] < 0 || wide > total.lane[i] : argmax[i] == step + u) {
          total.lane[i] = wide;
          argmax[i] = step + u;
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
    if (MAX && max_positions_ptr) store_integer(max_positions_ptr, out + i, argmax[i], max_position_bytes);
    narrow(
        !SPLIT && table.mode == MEAN_MODE ? total.lane[i] / (Acc)(size > 0 ? size : 1) : total.lane[i],
        output.lane[i]);
  }
  *(Vector<Output, VEC>*)(output_ptr + out) = output;
}

// grid:  cdiv(num_bags * D, blockDim.x); block: 1-D
// owner: thread i of the grid: element i of the flattened output
// why:   adds the partial sums of table_bag_kernel's splits in a fixed order: no atomics, deterministic
template <typename Output>
__global__ void table_combine_kernel(
    const typename Accumulator<Output>::type* __restrict__ partial_ptr,  // [num_splits, num_bags, D]
    const int64* __restrict__ sizes_ptr,  // mean: [num_splits, num_bags]: each split's share of the divisor; sum: null
    Output* __restrict__ output_ptr,      // [num_bags, D]
    int64 num_splits,
    int64 num_bags,
    int64 D) {
  using Acc = typename Accumulator<Output>::type;
  const int64 element = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (element >= num_bags * D) return;
  Acc total = 0;
  int64 size = 0;
  for (int64 split = 0; split < num_splits; ++split) {
    total += partial_ptr[split * num_bags * D + element];
    if (sizes_ptr) size += sizes_ptr[split * num_bags + element / D];
  }
  narrow(sizes_ptr ? total / (Acc)(size > 0 ? size : 1) : total, output_ptr[element]);
}

// grid:  cdiv(num_indices * D, blockDim.x); block: 1-D
// owner: thread i of the grid: word i of the flattened output; offsets i, i + all threads, ... to check (grid-stride)
// why:   no lane idles when a row is shorter than a warp; no thread owns a bag, so the offsets are shared out
template <typename Word>
__global__ void table_gather_kernel(
    const Word* __restrict__ weight_ptr,   // [rows of all tables, D], contiguous
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,  // any integer dtype, [num_all_bags + 1]
    const Table* __restrict__ tables_ptr,  // [num_tables]
    Word* __restrict__ output_ptr,         // [num_indices, D]
    int64* record_ptr,                     // [7]; null: do not record
    int32* flag_ptr,                       // [1], pinned host memory; null: do not record
    int64 num_indices,
    int64 num_bags,  // per table
    int64 num_all_bags,
    int64 num_tables,
    int64 zero_padding,  // rows of each table's padding_idx are zeroed
    int64 D,             // words per row
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
        record_ptr, flag_ptr, n, index, tables_ptr[t].num_rows, bag - t * num_bags + 1, begin, tables_ptr[t].name);
  }
}

// grid:  cdiv(num_indices, blockDim.x); block: 1-D
// owner: thread i of the grid: position i
// why:   later kernels read a position's key and output bag instead of searching for them per column
extern "C" __global__ void table_keys_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,  // any integer dtype, [num_all_bags + 1]
    const Table* __restrict__ tables_ptr,  // [num_tables]
    void* __restrict__ keys_ptr,           // [num_indices]: each id's row, num_rows: none; or null
    void* __restrict__ output_bag_ptr,     // [num_indices]: b * num_tables + t, -1: in no bag; or null
    int32* sizes_ptr,  // [num_all_bags], zero on entry: each output bag's divisor, 1 but for means; or null
    int64 num_indices,
    int64 num_bags,  // per table
    int64 num_all_bags,
    int64 num_tables,
    int64 num_rows,  // of all tables
    int64 index_bytes,
    int64 offset_bytes,
    int64 key_bytes,
    int64 output_bag_bytes) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const bool in_bag = n < load_integer(offsets_ptr, num_all_bags, offset_bytes);
  const int64 index = load_integer(indices_ptr, n, index_bytes);
  int64 bag = 0;
  int64 t;
  if (output_bag_ptr) {
    bag = find_range(offsets_ptr, n, num_all_bags, 1, offset_bytes);
    t = bag / num_bags;
  } else {
    t = find_range(offsets_ptr, n, num_tables, num_bags, offset_bytes);
  }
  const Table table = tables_ptr[t];
  const bool counted = in_bag && !is_padding(index, table.padding_idx);
  if (keys_ptr) {
    const bool kept = counted && names_row(index, table.num_rows);
    // num_rows is the sentinel of an id without a gradient: it sorts last.
    store_key(keys_ptr, n, kept ? table.first_row + index : num_rows, key_bytes);
  }
  if (!output_bag_ptr) return;
  const int64 output_bag = bag % num_bags * num_tables + t;
  store_integer(output_bag_ptr, n, in_bag ? output_bag : -1, output_bag_bytes);
  if (!sizes_ptr || !in_bag) return;
  // A bag's first position adds its whole length: atomics of each position would serialize at one address.
  const bool is_mean = table.mode == MEAN_MODE;
  int64 size = is_mean && !counted ? -1 : 0;
  const int64 begin = bag == 0 ? 0 : load_integer(offsets_ptr, bag, offset_bytes);
  if (n == begin) {
    size += is_mean ? load_integer(offsets_ptr, bag + 1, offset_bytes) - begin : 1;
  }
  if (size != 0) atomicAdd(sizes_ptr + output_bag, (int32)size);
}

// grid:  (cdiv(num_bags * D / VEC, blockDim.x), num_splits); block: 1-D
// owner: thread (i, s) of the grid: vector i of the flattened grad_output, split s of its bag
// why:   each vector of grad_output is loaded once per split and added to every row of the bag
template <typename Value, typename Grad, int VEC, int UNROLL>
__global__ void table_scatter_add_kernel(
    const Value* __restrict__ grad_output_ptr,         // [num_bags, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,              // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,              // any integer dtype, [num_all_bags + 1]
    const Value* __restrict__ per_sample_weights_ptr,  // [num_indices], contiguous; null: all 1
    const void* __restrict__ max_positions_ptr,        // [num_bags, D]: the argmax as a position; null: no maxima
    const Table* __restrict__ tables_ptr,              // [num_tables]
    const int32* __restrict__ table_of_column_ptr,     // [D]
    Grad* grad_weight_ptr,                             // the tables' buffer, fp32 or fp64
    int64 num_indices,
    int64 num_bags,  // per table
    int64 num_all_bags,
    int64 grad_row_stride,  // in units of VEC elements
    int64 grad_col_stride,  // in elements
    int64 D,                // total of all tables; VEC divides each one's
    int64 index_bytes,
    int64 offset_bytes,
    int64 max_position_bytes) {
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 b = thread / (D / VEC);
  const int64 column = thread % (D / VEC) * VEC;
  if (b >= num_bags) return;
  const int64 t = table_of_column_ptr[column];
  const Table table = tables_ptr[t];
  const Range range = load_range(
      offsets_ptr, t * num_bags + b, nullptr, nullptr, num_indices, num_all_bags + 1, 0, offset_bytes);
  const Range part = split_range(range);
  Grad* const first_row = grad_weight_ptr + table.first_element + column - table.first_column;
  const Vector<Value, VEC> row = *(const Vector<Value, VEC>*)(
      grad_output_ptr + b * grad_row_stride * VEC + column * grad_col_stride);
  Vector<Grad, VEC> grad;
#pragma unroll
  for (int i = 0; i < VEC; ++i) grad.lane[i] = widen(row.lane[i]);
  int64 argmax[VEC];
  const bool is_max = max_positions_ptr && table.mode == MAX_MODE;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    argmax[i] = is_max ? load_integer(max_positions_ptr, b * D + column + i, max_position_bytes) : -1;
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
        // One by one: few of the columns have their argmax here.
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          if (argmax[i] == step + u) atomicAdd(first_row + index[u] * table.dim + i, grad.lane[i]);
        }
        continue;
      }
      if (per_sample_weights_ptr) {
        const Grad scale = widen(per_sample_weights_ptr[step + u]);
#pragma unroll
        for (int i = 0; i < VEC; ++i) value.lane[i] *= scale;
      }
      atomic_add_vector(first_row + index[u] * table.dim, value);
    }
  }
}

// Stores a run's sum, rounded once. IN_PLACE: added to the row.
template <typename Grad, int VEC, bool IN_PLACE>
struct StoreTableGradient {
  using Acc = typename Accumulator<Grad>::type;
  using Row = Vector<Grad, VEC>;
  Grad* grad_weight_ptr;

  // VEC divides element; said in any other way, NVRTC stores one lane after another.
  __device__ Row& columns(int64 element) const { return ((Row*)grad_weight_ptr)[element / VEC]; }

  __device__ Row load(int64 element) const {
    Row row;
    set_zero(row);
    if (IN_PLACE) row = columns(element);
    return row;
  }

  __device__ void operator()(
      int64, int64 element, int64, const Vector<Acc, VEC>& total, Row row) const {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      narrow(IN_PLACE ? widen(row.lane[i]) + total.lane[i] : total.lane[i], row.lane[i]);
    }
    columns(element) = row;
  }
};

// grid:  cdiv(num_chunks * D / VEC, blockDim.x); block: 1-D
// owner: thread i of the grid: chunk i / (D / VEC), VEC columns from i % (D / VEC) * VEC on of each table that has them
// why:   segment_sum_kernel for tables of different widths, with the same slots; a row's width comes from
//        its table, so columns past it are masked
template <typename Value, typename Grad, int VEC, int UNROLL, bool IN_PLACE>
__global__ void table_segment_sum_kernel(
    const Value* __restrict__ values_ptr,   // grad_output, [num_bags, *], any strides (VEC > 1: column stride 1)
    const void* __restrict__ order_ptr,     // [num_keys]: each key's position before the sort
    const void* __restrict__ keys_ptr,      // [num_keys], sorted row numbers; keys outside [0, num_rows) are skipped
    const void* __restrict__ output_bag_ptr,   // [num_indices]: b * num_tables + t, -1: in no bag
    const Value* __restrict__ per_sample_weights_ptr,  // [num_indices]; null: all 1
    const int32* __restrict__ sizes_ptr,               // by output bag: the divisors of means; null: all 1
    const void* __restrict__ max_positions_ptr,        // [num_bags, *], contiguous: the argmax as a position; or null
    const Table* __restrict__ tables_ptr,              // [num_tables]
    Grad* __restrict__ grad_weight_ptr,                // the tables' buffer; zero on entry unless IN_PLACE
    typename Accumulator<Grad>::type* __restrict__ partial_ptr,  // [2 * num_chunks, D], by slot
    int64 num_keys,
    int64 num_rows,  // of all tables
    int64 num_tables,
    int64 chunk_size,
    int64 value_row_stride,         // in units of VEC elements
    int64 value_col_stride,         // in elements
    int64 max_position_row_stride,  // total columns of all tables
    int64 D,                        // the widest table's; VEC divides each one's
    int64 JOIN,  // 1: the second launch
    int64 order_bytes,
    int64 key_bytes,
    int64 output_bag_bytes,
    int64 max_position_bytes) {
  using Acc = typename Accumulator<Grad>::type;
  sum_table_runs<Value, Acc, VEC, UNROLL>(
      values_ptr, order_ptr, keys_ptr, output_bag_ptr, per_sample_weights_ptr, sizes_ptr,
      max_positions_ptr, tables_ptr, partial_ptr, num_keys,
      num_rows, num_tables, value_row_stride, value_col_stride, max_position_row_stride, D, chunk_size, JOIN,
      order_bytes, key_bytes, output_bag_bytes, max_position_bytes,
      StoreTableGradient<Grad, VEC, IN_PLACE>{grad_weight_ptr});
}

// grid:  cdiv(num_indices, blockDim.x); block: 1-D
// owner: thread i of the grid: position i; its result is the inner product of its row and its bag's gradient
// why:   each result is reduced within its thread, in a fixed order
template <typename Value, typename Weight, int VEC>
__global__ void table_sample_weights_kernel(
    const Value* __restrict__ grad_output_ptr,  // [num_bags, *], any strides; VEC > 1: column stride 1
    const Weight* __restrict__ weight_ptr,      // the tables' buffer
    const void* __restrict__ keys_ptr,          // [num_indices]: each position's row; num_rows: none
    const void* __restrict__ output_bag_ptr,    // [num_indices]: b * num_tables + t, -1: in no bag
    const Table* __restrict__ tables_ptr,       // [num_tables]
    Weight* __restrict__ grad_ptr,              // [num_indices]
    int64 num_indices,
    int64 num_rows,  // of all tables
    int64 num_tables,
    int64 grad_row_stride,  // in units of VEC elements
    int64 grad_col_stride,  // in elements
    int64 key_bytes,
    int64 output_bag_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 key = load_integer(keys_ptr, n, key_bytes);
  const int64 output_bag = load_integer(output_bag_ptr, n, output_bag_bytes);
  Acc total = 0;
  if (output_bag >= 0 && key < num_rows) {
    const Table table = tables_ptr[output_bag % num_tables];
    const Value* const grad_row = grad_output_ptr + output_bag / num_tables * grad_row_stride * VEC +
                                  table.first_column * grad_col_stride;
    const Weight* const row =
        weight_ptr + table.first_element + (key - table.first_row) * table.dim;
#pragma unroll 4
    for (int64 d = 0; d < table.dim; d += VEC) {
      const auto grad = *(const Vector<Value, VEC>*)(grad_row + d * grad_col_stride);
      const auto value = *(const Vector<Weight, VEC>*)(row + d);
#pragma unroll
      for (int i = 0; i < VEC; ++i) total += widen(grad.lane[i]) * widen(value.lane[i]);
    }
  }
  narrow(total, grad_ptr[n]);
}
