// Rows in the way of Keras's take: ids of any real dtype, negative ones counted from the end, rows converted.

#include "common.cuh"
#include "wrapped_index.cuh"

// A value of the same type keeps its bits.
template <typename T>
__device__ inline void convert(T value, T& out) {
  out = value;
}

template <typename From, typename To>
__device__ inline void convert(From value, To& out) {
  narrow(widen(value), out);
}

// Thread i of all owns vector i of the output.
template <typename Weight, typename Output, int VEC>
__global__ void take_rows_kernel(
    const Weight* __restrict__ weight_ptr,  // [num_embeddings, D], any strides
    const void* __restrict__ indices_ptr,   // any integer or float dtype, [num_indices], contiguous
    Output* __restrict__ output_ptr,        // [num_indices, D], contiguous
    int64* record_ptr,                      // [4], or null: do not record
    int32* flag_ptr,                        // [1], pinned host memory, or null
    int64 num_indices,
    int64 num_embeddings,
    int64 weight_row_stride,  // in units of VEC items
    int64 weight_col_stride,
    int64 D,  // < 2**31
    int64 index_kind) {
  const FlatVector own = flat_vector(D / VEC);
  if (own.n >= num_indices) return;
  const WrappedIndex id = load_wrapped_index(indices_ptr, own.n, index_kind, num_embeddings);
  const int64 d = own.vector * VEC;
  Vector<Weight, VEC> values;
  set_zero(values);
  if (id.in_table) {
    values = *(const Vector<Weight, VEC>*)(weight_ptr + id.row * weight_row_stride * VEC +
                                           d * weight_col_stride);
  }
  Vector<Output, VEC> converted;
#pragma unroll
  for (int i = 0; i < VEC; ++i) convert(values.lane[i], converted.lane[i]);
  *(Vector<Output, VEC>*)(output_ptr + own.n * D + d) = converted;
  if (record_ptr && d == 0 && !id.in_table) {
    record_out_of_range(record_ptr, flag_ptr, own.n, id.index, -num_embeddings);
  }
}
