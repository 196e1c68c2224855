// Bags: the sum, the mean or the largest of the rows that each bag of ids names, read once.
//
// Bag b holds the positions from offsets[b] up to offsets[b + 1], or to the last position where there is no such offset;
// without offsets all bags are equally long. Offsets are kept within the ids whatever they say.
//
// Where a bag may be too long for one thread, the ids are cut into chunks of chunk_length, and a bag longer than that
// into parts: a head of that length, and what lies behind the head in each chunk. A chunk has no more than one head,
// of the bag that begins in it, and behind heads no more than one bag, that of its first position; so part 2 * c is
// the head that begins in chunk c, and part 2 * c + 1 what chunk c has of a bag behind its head. Where the cuts are
// follows from the offsets and the shapes alone, so the order of the additions is the same from run to run.

#include "bag_range.cuh"
#include "common.cuh"

// The last bag that begins at position n or before it.
__device__ inline int64 find_bag(
    const void* offsets_ptr, int64 n, int64 num_bags, int64 bag_length, int64 offset_bytes) {
  if (!offsets_ptr) return n / bag_length;
  // offsets[low] <= n < offsets[high].
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

// What a thread walks.
struct Part {
  int64 bag;
  int64 begin;  // of the bag
  int64 first;
  int64 last;
  int64 number;  // of the part; -1: the bag as a whole
};

// The part of the row-th thread of a column: of a bag, or, behind those, of a chunk.
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
  const bool of_chunk = row >= num_bags;
  const int64 start = of_chunk ? (row - num_bags) * chunk_length : 0;
  const int64 bag =
      of_chunk ? find_bag(offsets_ptr, start, num_bags, bag_length, offset_bytes) : row;
  const Range range = load_range(
      offsets_ptr, bag, record_ptr, flag_ptr, num_indices, num_offsets, bag_length, offset_bytes);
  Part part = {bag, range.begin, range.begin, range.end, -1};
  if (chunk_length == 0) return part;
  if (of_chunk) {
    part.first = start > range.begin + chunk_length ? start : range.begin + chunk_length;
    part.last = clamp(start + chunk_length, part.first, range.end);
    part.number = 2 * (start / chunk_length) + 1;
  } else if (range.end - range.begin > chunk_length) {
    part.last = range.begin + chunk_length;
    part.number = 2 * (range.begin / chunk_length);
  }
  return part;
}

// Thread i of the grid owns row i / (D / VEC), and the VEC columns from i % (D / VEC) * VEC on. The first rows are
// bags; with partial_ptr those behind them are chunks. It walks alone and exchanges nothing.
template <typename Weight, int VEC, bool MEAN, int UNROLL>
__global__ void bag_sum_kernel(
    const Weight* __restrict__ weight_ptr,  // [num_embeddings, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,   // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,   // any integer dtype, [num_offsets]; null: equal lengths
    const Weight* __restrict__ per_sample_weights_ptr,  // [num_indices], contiguous; null: all 1
    Weight* __restrict__ output_ptr,        // [num_bags, D]
    typename Accumulator<Weight>::type* __restrict__ partial_ptr,  // [2 * num_chunks, D]; null: no bag is cut
    int64* __restrict__ sizes_ptr,          // [2 * num_chunks]: MEAN: the parts' ids that count
    int64* record_ptr,                      // [7], or null: do not record
    int32* flag_ptr,                        // [1], pinned host memory, or null
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,    // ids a bag, where there are no offsets
    int64 chunk_length,  // 0: no bag is cut
    int64 num_embeddings,
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
  if (d > 0) record_ptr = nullptr;  // the first columns' thread records for all
  const Part part = find_part(
      offsets_ptr, row, record_ptr, flag_ptr, num_indices, num_bags, num_offsets, bag_length,
      partial_ptr ? chunk_length : 0, offset_bytes);
  const int64 first = part.first;
  const int64 last = part.last;

  Vector<Acc, VEC> total;
  set_zero(total);
  int64 size = 0;
  for (int64 step = first; step < last; step += UNROLL) {
    // All loads of a step are issued before the first sum needs one.
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
      if (index[u] == padding_idx || !names_row(index[u], num_embeddings)) continue;
      value[u] = *(const Vector<Weight, VEC>*)(
          weight_ptr + index[u] * weight_row_stride * VEC + d * weight_col_stride);
      scale[u] = per_sample_weights_ptr ? widen(per_sample_weights_ptr[step + u]) : (Acc)1;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (step + u >= last || is_padding(index[u], padding_idx)) continue;
      ++size;
      if (record_ptr && !names_row(index[u], num_embeddings)) {
        record_out_of_range(
            record_ptr, flag_ptr, step + u, index[u], num_embeddings, part.bag + 1, part.begin);
      }
#pragma unroll
      for (int i = 0; i < VEC; ++i) total.lane[i] += widen(value[u].lane[i]) * scale[u];
    }
  }

  if (part.number >= 0) {
    if (first == last) return;
    if (MEAN && d == 0) sizes_ptr[part.number] = size;
    *(Vector<Acc, VEC>*)(partial_ptr + part.number * D + d) = total;
    return;
  }
  Vector<Weight, VEC> output;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    narrow(MEAN ? total.lane[i] / (Acc)(size > 0 ? size : 1) : total.lane[i], output.lane[i]);
  }
  *(Vector<Weight, VEC>*)(output_ptr + part.bag * D + d) = output;
}

// The bag whose head begins in a chunk, and how many parts it has; 0: there is none.
struct JoinedBag {
  int64 bag;
  int64 num_parts;
};

__device__ inline JoinedBag find_joined_bag(
    const void* offsets_ptr,
    int64 chunk,
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,
    int64 chunk_length,
    int64 offset_bytes) {
  // It goes on in the next chunk.
  const int64 place = (chunk + 1) * chunk_length;
  if (place >= num_indices) return {0, 0};
  const int64 bag = find_bag(offsets_ptr, place, num_bags, bag_length, offset_bytes);
  const Range range = load_range(
      offsets_ptr, bag, nullptr, nullptr, num_indices, num_offsets, bag_length, offset_bytes);
  const bool is_cut =
      range.begin / chunk_length == chunk && range.end - range.begin > chunk_length;
  return {bag, is_cut ? (range.end - 1) / chunk_length - chunk + 1 : 0};
}

// Thread i of the grid owns chunk i / D and column i % D: the sums of the parts of the cut bag that begins in the
// chunk, if there is one, added in their order.
template <typename Output>
__global__ void bag_join_kernel(
    const typename Accumulator<Output>::type* __restrict__ partial_ptr,  // [2 * num_chunks, D]
    const int64* __restrict__ sizes_ptr,   // [2 * num_chunks]: for the mean; null: the sum is asked for
    const void* __restrict__ offsets_ptr,  // any integer dtype, [num_offsets]; null: equal lengths
    Output* __restrict__ output_ptr,       // [num_bags, D]
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,  // ids a bag, where there are no offsets
    int64 chunk_length,
    int64 D,
    int64 offset_bytes) {
  using Acc = typename Accumulator<Output>::type;
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 chunk = thread / D;
  const int64 d = thread % D;
  const JoinedBag joined = find_joined_bag(
      offsets_ptr, chunk, num_indices, num_bags, num_offsets, bag_length, chunk_length, offset_bytes);
  if (joined.num_parts == 0) return;
  Acc total = 0;
  int64 size = 0;
#pragma unroll 4
  for (int64 i = 0; i < joined.num_parts; ++i) {
    // The head, and then what the chunks behind it have.
    const int64 number = 2 * (chunk + i) + (i > 0);
    total += partial_ptr[number * D + d];
    if (sizes_ptr) size += sizes_ptr[number];
  }
  narrow(
      sizes_ptr ? total / (Acc)(size > 0 ? size : 1) : total, output_ptr[joined.bag * D + d]);
}

// Thread i of the grid owns element i of the output: the sums of a split bag's parts, added in their order.
template <typename Output>
__global__ void bag_combine_kernel(
    const typename Accumulator<Output>::type* __restrict__ partial_ptr,  // [num_splits, num_bags, D]
    const int64* __restrict__ sizes_ptr,  // [num_splits, num_bags]: for the mean; null: the sum is asked for
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

// As bag_sum_kernel, of whole bags alone.
template <typename Weight, int VEC, int UNROLL>
__global__ void bag_max_kernel(
    const Weight* __restrict__ weight_ptr,  // [num_embeddings, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,   // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,   // any integer dtype, [num_offsets]; null: equal lengths
    Weight* __restrict__ output_ptr,        // [num_bags, D]
    int64* __restrict__ winner_ptr,  // [num_bags, D]: id * D + column of the largest, -1: none; null: not wanted
    int64* record_ptr,               // [7], or null: do not record
    int32* flag_ptr,                 // [1], pinned host memory, or null
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,  // ids a bag, where there are no offsets
    int64 num_embeddings,
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
  if (d > 0) record_ptr = nullptr;  // the first columns' thread records for all
  const Range range = load_range(
      offsets_ptr, bag, record_ptr, flag_ptr, num_indices, num_offsets, bag_length, offset_bytes);

  Vector<Weight, VEC> largest;
  set_zero(largest);
  int64 winner[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) winner[i] = -1;
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
      if (index[u] == padding_idx || !names_row(index[u], num_embeddings)) continue;
      value[u] = *(const Vector<Weight, VEC>*)(
          weight_ptr + index[u] * weight_row_stride * VEC + d * weight_col_stride);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (step + u >= range.end || is_padding(index[u], padding_idx)) continue;
      if (!names_row(index[u], num_embeddings)) {
        if (record_ptr) {
          record_out_of_range(
              record_ptr, flag_ptr, step + u, index[u], num_embeddings, bag + 1, range.begin);
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        // Not `>=`, so that the first of equals stays, and so does a NaN that came first.
        if (winner[i] < 0 || widen(value[u].lane[i]) > widen(largest.lane[i])) {
          largest.lane[i] = value[u].lane[i];
          winner[i] = index[u] * D + d + i;
        }
      }
    }
  }
  *(Vector<Weight, VEC>*)(output_ptr + bag * D + d) = largest;
  if (!winner_ptr) return;
#pragma unroll
  for (int i = 0; i < VEC; ++i) winner_ptr[bag * D + d + i] = winner[i];
}

// Thread i of the grid owns position i.
extern "C" __global__ void bag_of_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,  // any integer dtype, [num_offsets]; null: equal lengths
    void* __restrict__ bag_of_ptr,         // [num_indices]: the bag of each position, -1: none
    int32* sizes_ptr,                      // [num_bags], zero on entry: ids that count for the mean; null: not wanted
    int64 num_indices,
    int64 num_bags,
    int64 num_offsets,
    int64 bag_length,   // ids a bag, where there are no offsets
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

// Thread i of the grid owns position i: the inner product of its row and its bag's gradient.
template <typename Weight, int VEC>
__global__ void bag_sample_weights_kernel(
    const Weight* __restrict__ grad_output_ptr,  // [num_bags, D], any strides; VEC > 1: column stride 1
    const Weight* __restrict__ weight_ptr,       // [num_embeddings, D], as well
    const void* __restrict__ indices_ptr,        // any integer dtype, [num_indices], contiguous
    const void* __restrict__ bag_of_ptr,         // [num_indices]: the bag of each position, -1: none
    Weight* __restrict__ grad_ptr,               // [num_indices]
    int64 num_indices,
    int64 num_embeddings,
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
  const int64 bag = load_integer(bag_of_ptr, n, bag_bytes);
  Acc total = 0;
  if (bag >= 0 && names_row(index, num_embeddings) && index != padding_idx) {
    const Weight* const grad_row = grad_output_ptr + bag * grad_row_stride * VEC;
    const Weight* const row = weight_ptr + index * weight_row_stride * VEC;
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
