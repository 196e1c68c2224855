// Take, Keras's lookup: ids of any real dtype, negative ids wrapped, rows converted to the output's dtype.

#include "common.cuh"
#include "wrapped_index.cuh"

// The same type: the bits are kept, those of a NaN too.
template <typename T>
__device__ inline void convert(T value, T& out) {
  out = value;
}

template <typename From, typename To>
__device__ inline void convert(From value, To& out) {
  narrow(widen(value), out);
}

// grid:  cdiv(num_indices * D / VEC, blockDim.x); block: 1-D
// owner: thread i of the grid: vector i of the flattened output, across row boundaries
// why:   no lane idles when a row is shorter than a warp, or its length no power of two
template <typename Weight, typename Output, int VEC>
__global__ void take_rows_kernel(
    const Weight* __restrict__ weight_ptr,  // [num_embeddings, D], any strides
    const void* __restrict__ indices_ptr,   // any integer or float dtype, [num_indices], contiguous
    Output* __restrict__ output_ptr,        // [num_indices, D], contiguous
    int64* record_ptr,                      // [7]; null: do not record
    int32* flag_ptr,                        // [1], pinned host memory; null: do not record
    int64 num_indices,
    int64 num_embeddings,
    int64 weight_row_stride,  // in units of VEC elements
    int64 weight_col_stride,  // in elements
    int64 D,                  // < 2**31; VEC divides it
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
