// The walk over sorted keys of segment_sum.cu. EndRun: functor called with each complete run's sum.

#pragma once

#include "common.cuh"

// Thread i of the grid owns chunk i / (D / VEC) and the VEC columns from i % (D / VEC) * VEC on.
// A complete run's sum goes to end_run(key, d, total, count); count is its ids, with SCALE_GRAD_BY_FREQ.
// Carries go to the slots of the partial sums, or with EndRun::ATOMIC_CARRY to end_run.add(key, d, total).
//
// BAGS: position n reads row bag_of[n] of values, times its per-sample weight or over its bag's size.
template <
    typename Value,
    typename Acc,
    int VEC,
    bool SCALE_GRAD_BY_FREQ,
    int UNROLL,
    bool BAGS,
    typename Weight,
    typename EndRun>
__device__ inline void walk_runs(
    // [*, D], any strides (VEC > 1: column stride 1): grad_output, or the level below's partial sums
    const Value* __restrict__ values_ptr,
    const void* __restrict__ order_ptr,    // [num_keys]: each key's position before the sort; null: not permuted
    const void* __restrict__ keys_ptr,     // [num_keys], sorted; keys outside [0, num_embeddings) are skipped
    const int32* __restrict__ counts_ptr,  // [num_keys]: ids summed in each value; null: 1
    const void* __restrict__ bag_of_ptr,   // BAGS: [num_indices]: each position's bag, -1: in no bag
    const Weight* __restrict__ per_sample_weights_ptr,  // BAGS: [num_indices]; null: all 1
    const int32* __restrict__ sizes_ptr,                // BAGS: [num_bags]: the divisors of means; null: all 1
    // [2 * num_chunks, D], by slot. ATOMIC_CARRY: null, and so are the next two
    Acc* __restrict__ partial_values_ptr,
    int64* __restrict__ partial_keys_ptr,    // [2 * num_chunks]; -1: the slot is empty
    int32* __restrict__ partial_counts_ptr,  // [2 * num_chunks]
    int64 num_keys,
    int64 num_embeddings,
    int64 value_row_stride,  // in units of VEC elements
    int64 value_col_stride,  // in elements
    int64 D,                 // VEC divides it
    int64 CHUNK,             // UNROLL divides it
    int64 order_bytes,
    int64 key_bytes,
    int64 bag_bytes,
    const EndRun& end_run) {
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 chunk = thread / (D / VEC);
  const int64 d = thread % (D / VEC) * VEC;
  const int64 start = chunk * CHUNK;
  if (start >= num_keys) return;
  const int64 end = start + CHUNK < num_keys ? start + CHUNK : num_keys;
  const bool first_columns = d == 0;
  Acc* const carry_in_ptr = partial_values_ptr + 2 * chunk * D + d;
  Acc* const carry_out_ptr = carry_in_ptr + D;
  const auto store_carry = [&](Acc* partial, int64 row, const Vector<Acc, VEC>& sum) {
    if constexpr (EndRun::ATOMIC_CARRY) {
      end_run.add(row, d, sum);
    } else {
      *(Vector<Acc, VEC>*)partial = sum;
    }
  };

  int64 key = load_key(keys_ptr, start, key_bytes);
  // True while the current run began in an earlier chunk.
  bool carried = start > 0 && names_row(key, num_embeddings) &&
                 key == load_key(keys_ptr, start - 1, key_bytes);
  if (!EndRun::ATOMIC_CARRY && first_columns) {
    partial_keys_ptr[2 * chunk] = carried ? key : -1;
    partial_keys_ptr[2 * chunk + 1] = -1;
  }

  Vector<Acc, VEC> total;
  set_zero(total);
  int32 count = 0;
  bool run_ends = false;
  for (int64 first = start; first < end; first += UNROLL) {
    // All loads of a step are issued before the first addition.
    int64 next_key[UNROLL];
    int64 value_row[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64 position = first + u;
      next_key[u] = position + 1 < num_keys ? load_key(keys_ptr, position + 1, key_bytes) : -1;
      value_row[u] =
          order_ptr && position < end ? load_position(order_ptr, position, order_bytes) : position;
    }
    Vector<Value, VEC> value[UNROLL];
    int32 ids[UNROLL];
    Acc scale[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      set_zero(value[u]);
      ids[u] = 1;
      if (BAGS) scale[u] = 0;
      if (first + u < end && names_row(u == 0 ? key : next_key[u - 1], num_embeddings)) {
        if (BAGS) {
          const int64 n = value_row[u];
          value_row[u] = load_integer(bag_of_ptr, n, bag_bytes);
          if (value_row[u] < 0) {
            ids[u] = 0;
            continue;
          }
          scale[u] = bag_scale<Acc>(per_sample_weights_ptr, n, sizes_ptr, value_row[u]);
        }
        value[u] = *(const Vector<Value, VEC>*)(
            values_ptr + value_row[u] * value_row_stride * VEC + d * value_col_stride);
        if (SCALE_GRAD_BY_FREQ && counts_ptr) ids[u] = counts_ptr[first + u];
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (first + u >= end) break;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        total.lane[i] += BAGS ? widen(value[u].lane[i]) * scale[u] : widen(value[u].lane[i]);
      }
      count += ids[u];
      run_ends = key != next_key[u];
      if (run_ends) {
        if (carried) {
          store_carry(carry_in_ptr, key, total);
          if (SCALE_GRAD_BY_FREQ && first_columns) partial_counts_ptr[2 * chunk] = count;
        } else if (names_row(key, num_embeddings)) {
          // 0: no position of the run is in a bag.
          if (SCALE_GRAD_BY_FREQ && count == 0) count = 1;
          end_run(key, d, total, count);
        }
        set_zero(total);
        count = 0;
        carried = false;
      }
      key = next_key[u];
    }
  }

  // The last run goes on in the next chunk.
  if (end == num_keys || run_ends || !names_row(key, num_embeddings)) return;
  if (carried && !EndRun::ATOMIC_CARRY) {
    // A run that fills the chunk is its carry-in. Its carry-out is 0, so that the run's partial keys stay adjacent.
    *(Vector<Acc, VEC>*)carry_in_ptr = total;
    if (SCALE_GRAD_BY_FREQ && first_columns) partial_counts_ptr[2 * chunk] = count;
    set_zero(total);
    count = 0;
  }
  store_carry(carry_out_ptr, key, total);
  if (!EndRun::ATOMIC_CARRY && first_columns) {
    partial_keys_ptr[2 * chunk + 1] = key;
    if (SCALE_GRAD_BY_FREQ) partial_counts_ptr[2 * chunk + 1] = count;
  }
}
