// Bags: the sum, mean or maximum of each bag's rows; every row is read once.
//
// Bag b is ids [offsets[b], offsets[b + 1]), the last bag ends with the ids; without offsets each bag has bag_length
// ids. Wrong offsets are clamped to [0, num_indices]. Bags longer than chunk_length are cut as bag.py draws it: slot 2c
// holds the head of the bag that starts in chunk c, slot 2c + 1 the chunk's carry-in.

#include "bag_range.cuh"
#include "common.cuh"

// Binary search: the last bag that begins at or before position n.
__device__ inline int64 find_bag(
    const void* offsets_ptr, int64 n, int64 num_bags, int64 bag_length, int64 offset_bytes) {
  if (!offsets_ptr) return n / bag_length;
  // Invariant: offsets[low] <= n < offsets[high].
  int64 low = 0;
  int64 high = num_bags;
  while (high - low > 1) {
    const int64 middle = (low + high) / 2;
    const bool begun = load_integer(offsets_ptr, middle, offset_bytes) <= n;
    low = begun ? middle : low;
    high = begun ? high : middle;
  }
  return low;
}

// The positions [first, last) of a bag that a thread walks.
struct Part {
  int64 bag;
  int64 begin;  // the bag's
  int64 first;
  int64 last;
  int64 slot;         // -1: a whole bag
  bool follows_head;  // a carry-in, and the bag's head lies in the chunk before
};

// Row i < num_bags is bag i, or its head if it is cut; further rows are the carry-ins of chunks.
__device__ inline Part find_part(
    const void* offsets_ptr,
    int64 row,
    int64* record_ptr,
    int32* flag_ptr,
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,
    int64 chunk_length,
    int64 offset_bytes) {
  const bool is_carry_in = row >= num_bags;
  const int64 start = is_carry_in ? (row - num_bags) * chunk_length : 0;
  const int64 bag =
      is_carry_in ? find_bag(offsets_ptr, start, num_bags, bag_length, offset_bytes) : row;
  const Range range = load_range(
      offsets_ptr, bag, record_ptr, flag_ptr, num_indices, num_offsets, bag_length, offset_bytes);
  Part part = {bag, range.begin, range.begin, range.end, -1, false};
  if (chunk_length == 0) return part;
  if (is_carry_in) {
    part.first = start > range.begin + chunk_length ? start : range.begin + chunk_length;
    part.last = clamp(start + chunk_length, part.first, range.end);
    part.slot = 2 * (start / chunk_length) + 1;
    part.follows_head = range.end - range.begin > chunk_length &&
                        range.begin / chunk_length == start / chunk_length - 1;
  } else if (range.end - range.begin > chunk_length) {
    part.last = range.begin + chunk_length;
    part.slot = 2 * (range.begin / chunk_length);
  }
  return part;
}

// grid:  cdiv((num_bags + num_chunks) * D / VEC, blockDim.x); block: 1-D
// owner: thread i of the grid: bag i / (D / VEC), or behind the bags the carry-in of a chunk; VEC columns from
//        i % (D / VEC) * VEC on
// why:   each thread reduces its own part: no shared memory, no __syncthreads
//
// SHARD: a template argument, since first_row costs registers.
template <typename Weight, int VEC, bool MEAN, int UNROLL, bool SHARD>
__global__ void bag_sum_kernel(
    const Weight* __restrict__ weight_ptr,              // [num_embeddings, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,               // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,               // any integer dtype, [num_offsets]; null: equal lengths
    const Weight* __restrict__ per_sample_weights_ptr,  // [num_indices], contiguous; null: all 1
    Weight* __restrict__ output_ptr,                    // [num_bags, D]
    typename Accumulator<Weight>::type* __restrict__ partial_ptr,  // [2 * num_chunks, D], by slot; null: no bag is cut
    int64* __restrict__ sizes_ptr,     // MEAN: [2 * num_chunks]: each slot's ids but padding
    int64* __restrict__ cut_bags_ptr,  // [num_chunks]: the cut bag whose head lies in the chunk before, -1: none
    int64* record_ptr,                 // [7]; null: do not record
    int32* flag_ptr,                   // [1], pinned host memory; null: do not record
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,    // without offsets: ids per bag
    int64 chunk_length,  // 0: no bag is cut
    int64 num_embeddings,
    int64 first_row,          // SHARD: its first row in the whole table, which the ids are of
    int64 table_rows,         // SHARD: rows of the whole table
    int64 padding_idx,        // -1: none
    int64 weight_row_stride,  // in units of VEC elements
    int64 weight_col_stride,  // in elements
    int64 D,                  // VEC divides it
    int64 index_bytes,
    int64 offset_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 row = thread / (D / VEC);
  const int64 d = thread % (D / VEC) * VEC;
  const int64 num_chunks = partial_ptr ? (num_indices + chunk_length - 1) / chunk_length : 0;
  if (row >= num_bags + num_chunks) return;
  if (d > 0) record_ptr = nullptr;  // the thread of the first columns records
  const Part part = find_part(
      offsets_ptr, row, record_ptr, flag_ptr, num_indices, num_bags, num_offsets, bag_length,
      partial_ptr ? chunk_length : 0, offset_bytes);
  const int64 first = part.first;
  const int64 last = part.last;
  if (row >= num_bags && d == 0) cut_bags_ptr[row - num_bags] = part.follows_head ? part.bag : -1;

  const int64 limit = SHARD ? table_rows : num_embeddings;
  Vector<Acc, VEC> total;
  set_zero(total);
  int64 size = 0;
  for (int64 step = first; step < last; step += UNROLL) {
    // All loads of a step are issued before the first addition.
    int64 index[UNROLL];
    Acc scale[UNROLL];
    Vector<Weight, VEC> value[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      index[u] = step + u < last ? load_integer(indices_ptr, step + u, index_bytes) : -1;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      set_zero(value[u]);
      scale[u] = 0;
      const int64 table_row = local_row<SHARD>(index[u], first_row);
      if (index[u] == padding_idx || !names_row(table_row, num_embeddings)) continue;
      value[u] = *(const Vector<Weight, VEC>*)(
          weight_ptr + table_row * weight_row_stride * VEC + d * weight_col_stride);
      scale[u] = per_sample_weights_ptr ? widen(per_sample_weights_ptr[step + u]) : (Acc)1;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (step + u >= last || is_padding(index[u], padding_idx)) continue;
      ++size;
      if (record_ptr && !names_row(index[u], limit)) {
        record_out_of_range(
            record_ptr, flag_ptr, step + u, index[u], limit, part.bag + 1, part.begin);
      }
#pragma unroll
      for (int i = 0; i < VEC; ++i) total.lane[i] += widen(value[u].lane[i]) * scale[u];
    }
  }

  if (part.slot >= 0) {
    if (first >= last) return;
    if (MEAN && d == 0) sizes_ptr[part.slot] = size;
    *(Vector<Acc, VEC>*)(partial_ptr + part.slot * D + d) = total;
    return;
  }
  Vector<Weight, VEC> output;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    narrow(MEAN ? total.lane[i] / (Acc)(size > 0 ? size : 1) : total.lane[i], output.lane[i]);
  }
  *(Vector<Weight, VEC>*)(output_ptr + part.bag * D + d) = output;
}

// grid:  cdiv(num_chunks * D, blockDim.x); block: 1-D
// owner: thread i of the grid: the cut bag whose head lies in the chunk before i / D, if any; column i % D
// why:   adds a bag's partial sums in a fixed order: no atomics, deterministic; as a rule there is nothing to add
template <typename Output>
__global__ void bag_join_kernel(
    const typename Accumulator<Output>::type* __restrict__ partial_ptr,  // [2 * num_chunks, D], by slot
    const int64* __restrict__ sizes_ptr,     // mean: [2 * num_chunks]: each slot's ids but padding; sum: null
    const int64* __restrict__ cut_bags_ptr,  // [num_chunks]: the cut bag whose head lies in the chunk before, -1: none
    const void* __restrict__ offsets_ptr,    // any integer dtype, [num_offsets]; null: equal lengths
    Output* __restrict__ output_ptr,         // [num_bags, D]
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,  // without offsets: ids per bag
    int64 chunk_length,
    int64 num_chunks,
    int64 D,
    int64 offset_bytes) {
  using Acc = typename Accumulator<Output>::type;
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 chunk = thread / D;
  const int64 d = thread % D;
  if (chunk >= num_chunks || cut_bags_ptr[chunk] < 0) return;
  const int64 bag = cut_bags_ptr[chunk];
  const Range range = load_range(
      offsets_ptr, bag, nullptr, nullptr, num_indices, num_offsets, bag_length, offset_bytes);
  const int64 num_parts = (range.end - 1) / chunk_length - (chunk - 1) + 1;
  Acc total = 0;
  int64 size = 0;
#pragma unroll 4
  for (int64 part = 0; part < num_parts; ++part) {
    // Part 0 is the head, each later one the carry-in of a chunk.
    const int64 slot = 2 * (chunk - 1 + part) + (part > 0);
    total += partial_ptr[slot * D + d];
    if (sizes_ptr) size += sizes_ptr[slot];
  }
  narrow(sizes_ptr ? total / (Acc)(size > 0 ? size : 1) : total, output_ptr[bag * D + d]);
}

// grid:  cdiv(num_bags * D / VEC, blockDim.x); block: 1-D
// owner: thread i of the grid: bag i / (D / VEC), VEC columns from i % (D / VEC) * VEC on
// why:   as bag_sum_kernel, but never cuts a bag: both backends share one plan, and Triton cannot cut these well
//
// SHARD: a template argument, since its rule for NaN costs instructions: see Backend.embedding_bag_max.
template <typename Weight, int VEC, int UNROLL, bool SHARD>
__global__ void bag_max_kernel(
    const Weight* __restrict__ weight_ptr,  // [num_embeddings, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,   // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,   // any integer dtype, [num_offsets]; null: equal lengths
    Weight* __restrict__ output_ptr,        // [num_bags, D]
    int64* __restrict__ argmax_ptr,  // [num_bags, D]: id * D + column (SHARD: position), -1: none; null: not wanted
    int64* record_ptr,                      // [7]; null: do not record
    int32* flag_ptr,                        // [1], pinned host memory; null: do not record
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,  // without offsets: ids per bag
    int64 num_embeddings,
    int64 first_row,          // SHARD: its first row in the whole table, which the ids are of
    int64 table_rows,         // SHARD: rows of the whole table
    int64 padding_idx,        // -1: none
    int64 weight_row_stride,  // in units of VEC elements
    int64 weight_col_stride,  // in elements
    int64 D,                  // VEC divides it
    int64 index_bytes,
    int64 offset_bytes) {
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 bag = thread / (D / VEC);
  const int64 d = thread % (D / VEC) * VEC;
  if (bag >= num_bags) return;
  if (d > 0) record_ptr = nullptr;  // the thread of the first columns records
  const Range range = load_range(
      offsets_ptr, bag, record_ptr, flag_ptr, num_indices, num_offsets, bag_length, offset_bytes);

  const int64 limit = SHARD ? table_rows : num_embeddings;
  Vector<Weight, VEC> largest;
  set_zero(largest);
  int64 argmax[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) argmax[i] = -1;
  // Whether a row of the bag came before, of whatever shard.
  bool begun = false;
  for (int64 step = range.begin; step < range.end; step += UNROLL) {
    int64 index[UNROLL];
    Vector<Weight, VEC> value[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      index[u] =
          step + u < range.end ? load_integer(indices_ptr, step + u, index_bytes) : -1;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64 row = local_row<SHARD>(index[u], first_row);
      if (index[u] == padding_idx || !names_row(row, num_embeddings)) continue;
      value[u] = *(const Vector<Weight, VEC>*)(
          weight_ptr + row * weight_row_stride * VEC + d * weight_col_stride);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (step + u >= range.end || is_padding(index[u], padding_idx)) continue;
      if (!names_row(index[u], limit)) {
        if (record_ptr) {
          record_out_of_range(
              record_ptr, flag_ptr, step + u, index[u], limit, bag + 1, range.begin);
        }
        continue;
      }
      const bool leads = !SHARD || !begun;
      begun = true;
      if (SHARD && !names_row(local_row(index[u], first_row), num_embeddings)) continue;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const auto lane = widen(value[u].lane[i]);
        // `>`, not `>=`: the first of equals stays, as does a NaN in the bag's first row.
        if ((argmax[i] < 0 && (leads || lane == lane)) || lane > widen(largest.lane[i])) {
          largest.lane[i] = value[u].lane[i];
          argmax[i] = SHARD ? step + u : index[u] * D + d + i;
        }
      }
    }
  }
  *(Vector<Weight, VEC>*)(output_ptr + bag * D + d) = largest;
  if (!argmax_ptr) return;
#pragma unroll
  for (int i = 0; i < VEC; ++i) argmax_ptr[bag * D + d + i] = argmax[i];
}

// grid:  cdiv(num_indices, blockDim.x); block: 1-D
// owner: thread i of the grid: position i
// why:   the gradient kernels read a position's bag instead of searching for it per column
extern "C" __global__ void bag_of_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,  // any integer dtype, [num_offsets]; null: equal lengths
    void* __restrict__ bag_of_ptr,         // [num_indices]; -1: in no bag
    int32* sizes_ptr,                      // mean: [num_bags], zero on entry: each bag's ids but padding; else null
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,   // without offsets: ids per bag
    int64 padding_idx,  // -1: none
    int64 index_bytes,
    int64 offset_bytes,
    int64 bag_bytes) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  int64 bag = find_bag(offsets_ptr, n, num_bags, bag_length, offset_bytes);
  if (num_offsets > num_bags && n >= load_integer(offsets_ptr, num_bags, offset_bytes)) bag = -1;
  store_integer(bag_of_ptr, n, bag, bag_bytes);
  if (!sizes_ptr || bag < 0) return;
  if (!is_padding(load_integer(indices_ptr, n, index_bytes), padding_idx)) atomicAdd(sizes_ptr + bag, 1);
}

// grid:  cdiv(num_indices, blockDim.x); block: 1-D
// owner: thread i of the grid: position i; its result is the inner product of its row and its bag's gradient
// why:   each result is reduced within its thread, in a fixed order
template <typename Weight, int VEC>
__global__ void bag_sample_weights_kernel(
    const Weight* __restrict__ grad_output_ptr,  // [num_bags, D], any strides; VEC > 1: column stride 1
    const Weight* __restrict__ weight_ptr,       // [num_embeddings, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,        // any integer dtype, [num_indices], contiguous
    const void* __restrict__ bag_of_ptr,         // [num_indices]; -1: in no bag
    Weight* __restrict__ grad_ptr,               // [num_indices]
    int64 num_indices,
    int64 num_embeddings,
    int64 first_row,          // of a shard, in the whole table, which the ids are of; no shard: 0
    int64 padding_idx,        // -1: none
    int64 grad_row_stride,    // in units of VEC elements
    int64 grad_col_stride,    // in elements
    int64 weight_row_stride,  // in units of VEC elements
    int64 weight_col_stride,  // in elements
    int64 D,                  // VEC divides it
    int64 index_bytes,
    int64 bag_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 index = load_integer(indices_ptr, n, index_bytes);
  const int64 table_row = local_row(index, first_row);
  const int64 bag = load_integer(bag_of_ptr, n, bag_bytes);
  Acc total = 0;
  if (bag >= 0 && names_row(table_row, num_embeddings) && index != padding_idx) {
    const Weight* const grad_row = grad_output_ptr + bag * grad_row_stride * VEC;
    const Weight* const row = weight_ptr + table_row * weight_row_stride * VEC;
#pragma unroll 4
    for (int64 d = 0; d < D; d += VEC) {
      const auto grad = *(const Vector<Weight, VEC>*)(grad_row + d * grad_col_stride);
      const auto value = *(const Vector<Weight, VEC>*)(row + d * weight_col_stride);
#pragma unroll
      for (int i = 0; i < VEC; ++i) total += widen(grad.lane[i]) * widen(value.lane[i]);
    }
  }
  narrow(total, grad_ptr[n]);
}
