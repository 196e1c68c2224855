// Ids as Keras takes them: of any real dtype, and counted from the end where they are negative.

#pragma once

#include "common.cuh"

// In the order of INDEX_KINDS in the host code.
enum class IndexKind : int64 { U8, I8, I16, I32, I64, F16, BF16, F32, F64 };

struct WrappedIndex {
  int64 index;  // cut to an integer
  int64 row;    // that it means
  bool in_table;
};

// The integer of a float; `is_number` is false for NaN, which is no row and is recorded as the least integer.
template <typename Float>
__device__ inline int64 cut(Float value, bool& is_number) {
  is_number = value == value;
  return is_number ? (int64)value : (int64)(1ull << 63);
}

// Id n of an array of that kind: one kernel serves them all, and every thread takes the same branch.
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
      index = cut(widen(((const float16*)ptr)[n]), is_number);
      break;
    case IndexKind::BF16:
      index = cut(widen(((const bfloat16*)ptr)[n]), is_number);
      break;
    case IndexKind::F32:
      index = cut(((const float*)ptr)[n], is_number);
      break;
    case IndexKind::F64:
      index = cut(((const double*)ptr)[n], is_number);
      break;
  }
  const int64 row = index < 0 ? index + num_embeddings : index;
  return {index, row, is_number && names_row(row, num_embeddings)};
}

// Which row of the output, and which of its vectors, this thread owns: blocks own consecutive vectors, whatever
// rows they lie in.
struct FlatVector {
  int64 n;
  int64 vector;
};

__device__ inline FlatVector flat_vector(int64 row_vectors) {
  const int64 start = (int64)blockIdx.x * blockDim.x;
  const int64 first_n = start / row_vectors;
  // The 64-bit division is done once a thread; lanes divide 32-bit numbers.
  const uint32 lane = (uint32)(start - first_n * row_vectors) + threadIdx.x;
  return {first_n + lane / (uint32)row_vectors, lane % (uint32)row_vectors};
}
