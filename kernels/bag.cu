// Bags: the sum, the mean or the largest of the rows that each bag of ids names, read once.
//
// Bag b holds the positions from offsets[b] up to offsets[b + 1], or to the last position where there is no such offset;
// without offsets all bags are equally long. Offsets are kept within the ids whatever they say.

#include "bag_range.cuh"
#include "common.cuh"

// Thread (i, s) of the grid owns bag i / (D / VEC), the VEC columns from i % (D / VEC) * VEC on, and the s-th of as
// many equal parts of the bag as the grid is deep. It walks its part alone and exchanges nothing.
//
// Weight: of the table. Output: the same; or, with SPLIT, what sums are taken in.
template <typename Weight, typename Output, int VEC, bool MEAN, bool SPLIT, int UNROLL>
__global__ void bag_sum_kernel(
    const Weight* __restrict__ weight_ptr,  // [num_embeddings, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,   // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,   // any integer dtype, [num_offsets]; null: equal lengths
    const Weight* __restrict__ per_sample_weights_ptr,  // [num_indices], contiguous; null: all 1
    Output* __restrict__ output_ptr,        // [num_bags, D]; SPLIT: [num_splits, num_bags, D]
    int64* __restrict__ sizes_ptr,          // [num_splits, num_bags]: SPLIT and MEAN: the parts' ids that count
    int64* record_ptr,                      // [6], or null: do not record
    int32* flag_ptr,                        // [1], pinned host memory, or null
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
  using Acc = typename Accumulator<Weight>::type;
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 bag = thread / (D / VEC);
  const int64 d = thread % (D / VEC) * VEC;
  if (bag >= num_bags) return;
  if (d > 0) record_ptr = nullptr;  // the first columns' thread records for all
  const Range range = load_range(
      offsets_ptr, bag, record_ptr, flag_ptr, num_indices, num_offsets, bag_length, offset_bytes);
  int64 first = range.begin;
  int64 last = range.end;
  if (SPLIT) {
    const int64 length = (last - first + gridDim.y - 1) / gridDim.y;
    first = clamp(first + blockIdx.y * length, first, last);
    last = clamp(first + length, first, last);
  }

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
            record_ptr, flag_ptr, step + u, index[u], num_embeddings, bag + 1, range.begin);
      }
#pragma unroll
      for (int i = 0; i < VEC; ++i) total.lane[i] += widen(value[u].lane[i]) * scale[u];
    }
  }

  const int64 row = SPLIT ? blockIdx.y * num_bags + bag : bag;
  if (SPLIT && MEAN && d == 0) sizes_ptr[row] = size;
  Vector<Output, VEC> output;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    narrow(
        MEAN && !SPLIT ? total.lane[i] / (Acc)(size > 0 ? size : 1) : total.lane[i],
        output.lane[i]);
  }
  *(Vector<Output, VEC>*)(output_ptr + row * D + d) = output;
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

// As bag_sum_kernel, without parts.
template <typename Weight, int VEC, int UNROLL>
__global__ void bag_max_kernel(
    const Weight* __restrict__ weight_ptr,  // [num_embeddings, D], any strides; VEC > 1: column stride 1
    const void* __restrict__ indices_ptr,   // any integer dtype, [num_indices], contiguous
    const void* __restrict__ offsets_ptr,   // any integer dtype, [num_offsets]; null: equal lengths
    Weight* __restrict__ output_ptr,        // [num_bags, D]
    int64* __restrict__ winner_ptr,  // [num_bags, D]: id * D + column of the largest, -1: none; null: not wanted
    int64* record_ptr,               // [6], or null: do not record
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
  int64 bag;
  if (offsets_ptr) {
    // The last bag that begins at n or before it: offsets[low] <= n < offsets[high].
    int64 low = 0;
    int64 high = num_bags;
    while (high - low > 1) {
      const int64 middle = (low + high) / 2;
      const bool begun = load_integer(offsets_ptr, middle, offset_bytes) <= n;
      low = begun ? middle : low;
      high = begun ? high : middle;
    }
    bag = low;
    if (num_offsets > num_bags && n >= load_integer(offsets_ptr, num_bags, offset_bytes)) bag = -1;
  } else {
    bag = n / bag_length;
  }
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
