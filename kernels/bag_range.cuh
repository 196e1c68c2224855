// A bag's range of positions, clamped to [0, num_indices] against wrong offsets.

#pragma once

#include "common.cuh"

// Positions [begin, end).
struct Range {
  int64 begin;
  int64 end;
};

__device__ inline int64 clamp(int64 value, int64 low, int64 high) {
  return value < low ? low : value > high ? high : value;
}

// padding_idx = -1 disables padding: an out-of-range id of -1 must not match it.
__device__ inline bool is_padding(int64 index, int64 padding_idx) {
  return index == padding_idx && index >= 0;
}

// The bag's clamped range; a wrong offset is recorded, if there is a record.
__device__ inline Range load_range(
    const void* offsets_ptr,
    int64 bag,
    int64* record_ptr,
    int32* flag_ptr,
    int64 num_indices,
    int64 num_offsets,
    int64 bag_length,
    int64 offset_bytes) {
  if (!offsets_ptr) return {bag * bag_length, (bag + 1) * bag_length};
  const int64 offset = load_integer(offsets_ptr, bag, offset_bytes);
  const int64 next =
      bag + 1 < num_offsets ? load_integer(offsets_ptr, bag + 1, offset_bytes) : num_indices;
  const int64 begin = bag == 0 ? 0 : clamp(offset, 0, num_indices);
  const int64 end = clamp(next, begin, num_indices);
  if (record_ptr && (offset != begin || next != end)) {
    // Blame the bag's own offset first, then the next one.
    const bool own = offset != begin;
    record_out_of_range(
        record_ptr, flag_ptr, own ? bag : bag + 1, own ? offset : next, num_indices, -1, begin);
  }
  return {begin, end};
}
