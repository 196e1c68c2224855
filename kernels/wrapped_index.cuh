// Keras's ids: of any real dtype; negative ids are wrapped, i.e. count from the end.

#pragma once

#include "common.cuh"

// In the order of KERAS_IDS in gpu_embed/dtypes.py; the launch passes the index in that list.
enum class IndexKind : int64 { U8, I8, I16, I32, I64, F16, BF16, F32, F64 };

struct WrappedIndex {
  int64 index;  // truncated, not wrapped: for the error message
  int64 row;    // wrapped
  bool in_table;
};

// Truncates a float. NaN: is_number is false, and the smallest integer is recorded.
template <typename Float>
__device__ inline int64 truncate_float(Float value, bool& is_number) {
  is_number = value == value;
  return is_number ? (int64)value : (int64)(1ull << 63);
}

// Id n of an array of that kind. One kernel serves all dtypes: the branch is uniform over the grid.
__device__ inline WrappedIndex load_wrapped_index(
    const void* ptr, int64 n, int64 kind, int64 num_embeddings) {
  bool is_number = true;
  int64 index = 0;
  switch ((IndexKind)kind) {
    case IndexKind::U8:
      index = ((const uint8*)ptr)[n];
      break;
    case IndexKind::I8:
      index = ((const int8*)ptr)[n];
      break;
    case IndexKind::I16:
      index = ((const int16*)ptr)[n];
      break;
    case IndexKind::I32:
      index = ((const int32*)ptr)[n];
      break;
    case IndexKind::I64:
      index = ((const int64*)ptr)[n];
      break;
    case IndexKind::F16:
      index = truncate_float(widen(((const float16*)ptr)[n]), is_number);
      break;
    case IndexKind::BF16:
      index = truncate_float(widen(((const bfloat16*)ptr)[n]), is_number);
      break;
    case IndexKind::F32:
      index = truncate_float(((const float*)ptr)[n], is_number);
      break;
    case IndexKind::F64:
      index = truncate_float(((const double*)ptr)[n], is_number);
      break;
  }
  const int64 row = index < 0 ? index + num_embeddings : index;
  return {index, row, is_number && names_row(row, num_embeddings)};
}

// This thread's row n of the output and its vector in that row; blocks ignore row boundaries.
struct FlatVector {
  int64 n;
  int64 vector;
};

__device__ inline FlatVector flat_vector(int64 row_vectors) {
  const int64 start = (int64)blockIdx.x * blockDim.x;
  const int64 first_n = start / row_vectors;
  // One 64-bit division per thread, the same in a block; the others are in 32 bits.
  const uint32 flat_offset = (uint32)(start - first_n * row_vectors) + threadIdx.x;
  return {first_n + flat_offset / (uint32)row_vectors, flat_offset % (uint32)row_vectors};
}
