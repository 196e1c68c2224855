// The walk over sorted keys of segment_sum.cu, and the join of what it leaves. EndRun: functor called with each complete
// run's sum, and with what its `load` has read of the run's row ahead of that.

#pragma once

#include "common.cuh"

// Where the ids of each slot lie, behind the partial sums and in their dtype.
template <typename Acc>
__device__ inline Acc* slot_counts(Acc* partial_ptr, int64 num_keys, int64 chunk_size, int64 D) {
  return partial_ptr + 2 * ((num_keys + chunk_size - 1) / chunk_size) * D;
}

// Whether the thread's chunk holds the begin of a run that goes on behind it, and so the thread joins that run.
__device__ inline bool begins_crossing_run(
    const void* keys_ptr,
    int64 chunk,
    int64 chunk_size,
    int64 num_keys,
    int64 num_rows,
    int64 key_bytes) {
  const int64 start = chunk * chunk_size;
  const int64 last = start + chunk_size - 1;
  if (last + 1 >= num_keys) return false;
  const int64 key = load_key(keys_ptr, last, key_bytes);
  return names_row(key, num_rows) && load_key(keys_ptr, last + 1, key_bytes) == key &&
         (start == 0 || load_key(keys_ptr, start - 1, key_bytes) != key);
}

// The sum of VEC columns of a run that begins in a chunk and goes on behind it: its carry-out, then the carry-ins of the
// chunks that begin within it, from left to right. counts_ptr: of slots, which sum up to *count; null: not counted.
template <typename Acc, int VEC, int UNROLL>
__device__ inline Vector<Acc, VEC> join_carries(
    const void* keys_ptr,
    const Acc* partial_ptr,
    const Acc* counts_ptr,
    int64 chunk,
    int64 chunk_size,
    int64 num_keys,
    int64 d,
    int64 D,
    int64 key_bytes,
    int32* count) {
  const int64 key = load_key(keys_ptr, (chunk + 1) * chunk_size - 1, key_bytes);
  Vector<Acc, VEC> total = *(const Vector<Acc, VEC>*)(partial_ptr + (2 * chunk + 1) * D + d);
  if (counts_ptr) *count = (int32)counts_ptr[2 * chunk + 1];
  bool goes_on = true;
  for (int64 first = chunk + 1; goes_on; first += UNROLL) {
    // All loads of a step are issued before the first addition.
    Vector<Acc, VEC> part[UNROLL];
    bool taken[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64 start = (first + u) * chunk_size;
      taken[u] = start < num_keys && load_key(keys_ptr, start, key_bytes) == key;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      set_zero(part[u]);
      if (!taken[u]) continue;
      part[u] = *(const Vector<Acc, VEC>*)(partial_ptr + 2 * (first + u) * D + d);
      if (counts_ptr) *count += (int32)counts_ptr[2 * (first + u)];
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) total.lane[i] += part[u].lane[i];
    }
    goes_on = taken[UNROLL - 1];
  }
  return total;
}

// Thread i of the grid owns chunk i / (D / VEC) and the VEC columns from i % (D / VEC) * VEC on.
// A complete run's sum goes to end_run(key, d, total, count, end_run.load(key, d)); count is its ids, with
// SCALE_GRAD_BY_FREQ.
// Carries go to the slots of the partial sums, or with EndRun::ATOMIC_CARRY to end_run.add(key, d, total).
// join: the second launch, which ends the runs that begin in the thread's chunk and cross its edge.
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
__device__ inline void sum_runs(
    const Value* __restrict__ values_ptr,  // [*, D], any strides (VEC > 1: column stride 1): grad_output
    const void* __restrict__ order_ptr,    // [num_keys]: each key's position before the sort
    const void* __restrict__ keys_ptr,     // [num_keys], sorted; keys outside [0, num_embeddings) are skipped
    const void* __restrict__ bag_of_ptr,   // BAGS: [num_indices]: each position's bag, -1: in no bag
    const Weight* __restrict__ per_sample_weights_ptr,  // BAGS: [num_indices]; null: all 1
    const int32* __restrict__ sizes_ptr,                // BAGS: [num_bags]: the divisors of means; null: all 1
    // [2 * num_chunks, D], by slot, and behind that the ids of each slot, with SCALE_GRAD_BY_FREQ. ATOMIC_CARRY: null
    Acc* __restrict__ partial_ptr,
    int64 num_keys,
    int64 num_embeddings,
    int64 value_row_stride,  // in units of VEC elements
    int64 value_col_stride,  // in elements
    int64 D,                 // VEC divides it
    int64 chunk_size,
    int64 join,
    int64 order_bytes,
    int64 key_bytes,
    int64 bag_bytes,
    const EndRun& end_run) {
  const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  const int64 chunk = thread / (D / VEC);
  const int64 d = thread % (D / VEC) * VEC;
  const int64 start = chunk * chunk_size;
  if (start >= num_keys) return;
  const bool first_columns = d == 0;
  Acc* const counts_ptr =
      SCALE_GRAD_BY_FREQ ? slot_counts(partial_ptr, num_keys, chunk_size, D) : nullptr;
  if (join) {
    if (!begins_crossing_run(keys_ptr, chunk, chunk_size, num_keys, num_embeddings, key_bytes)) return;
    const int64 key = load_key(keys_ptr, start + chunk_size - 1, key_bytes);
    const typename EndRun::Row old = end_run.load(key, d);
    int32 count = 0;
    const Vector<Acc, VEC> total = join_carries<Acc, VEC, UNROLL>(
        keys_ptr, partial_ptr, counts_ptr, chunk, chunk_size, num_keys, d, D, key_bytes, &count);
    // 0: no position of the run is in a bag.
    if (SCALE_GRAD_BY_FREQ && count == 0) count = 1;
    end_run(key, d, total, count, old);
    return;
  }
  const int64 end = start + chunk_size < num_keys ? start + chunk_size : num_keys;
  const auto store_carry = [&](int64 slot, int64 row, const Vector<Acc, VEC>& sum, int32 ids) {
    if constexpr (EndRun::ATOMIC_CARRY) {
      end_run.add(row, d, sum);
    } else {
      *(Vector<Acc, VEC>*)(partial_ptr + slot * D + d) = sum;
      if (SCALE_GRAD_BY_FREQ && first_columns) counts_ptr[slot] = (Acc)ids;
    }
  };

  int64 key = load_key(keys_ptr, start, key_bytes);
  // A chunk that begins with a sentinel holds nothing else.
  if (!names_row(key, num_embeddings)) return;
  // True while the current run began in an earlier chunk.
  bool carried = start > 0 && key == load_key(keys_ptr, start - 1, key_bytes);

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
      value_row[u] = position < end ? load_position(order_ptr, position, order_bytes) : 0;
    }
    Vector<Value, VEC> value[UNROLL];
    typename EndRun::Row old[UNROLL];
    int32 ids[UNROLL];
    Acc scale[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      set_zero(value[u]);
      ids[u] = 1;
      if (BAGS) scale[u] = 0;
      const int64 key_here = u == 0 ? key : next_key[u - 1];
      if (first + u < end && names_row(key_here, num_embeddings)) {
        // A run that began in an earlier chunk is that chunk's.
        if (key_here != next_key[u] && !(carried && key_here == key)) old[u] = end_run.load(key_here, d);
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
          store_carry(2 * chunk, key, total, count);
        } else if (names_row(key, num_embeddings)) {
          // 0: no position of the run is in a bag.
          if (SCALE_GRAD_BY_FREQ && count == 0) count = 1;
          end_run(key, d, total, count, old[u]);
        }
        set_zero(total);
        count = 0;
        carried = false;
      }
      key = next_key[u];
    }
  }

  // The last run goes on in the next chunk. One that fills the chunk is its carry-in.
  if (end == num_keys || run_ends || !names_row(key, num_embeddings)) return;
  store_carry(carried ? 2 * chunk : 2 * chunk + 1, key, total, count);
}
