// Rows of a table of 8-bit or 4-bit integers, as Keras quantizes one: only the rows that ids name are dequantized.
//
// A group of columns of a row shares a scale: output = value / scale, or (value - zero) * scale where there are
// zeros. Two 4-bit columns share a byte, the even one in its lower half. Ids are those of take_rows_kernel.

#include "common.cuh"
#include "wrapped_index.cuh"

// The lower four bits, from -8 to 7.
__device__ inline int32 signed_half(int32 byte) { return ((byte & 15) ^ 8) - 8; }

// VEC columns of a row, from column d on.
template <int VEC, int BITS>
__device__ inline void load_columns(
    const int8* values_ptr, int64 row, int64 d, int64 D, int32 (&columns)[VEC]) {
  if constexpr (BITS == 8) {
    const auto loaded = *(const Vector<int8, VEC>*)(values_ptr + row * D + d);
#pragma unroll
    for (int i = 0; i < VEC; ++i) columns[i] = loaded.lane[i];
  } else if constexpr (VEC == 1) {
    const int32 byte = values_ptr[row * ((D + 1) / 2) + d / 2];
    columns[0] = signed_half(byte >> (d % 2 * 4));
  } else {
    const auto loaded =
        *(const Vector<int8, VEC / 2>*)(values_ptr + row * ((D + 1) / 2) + d / 2);
#pragma unroll
    for (int i = 0; i < VEC; ++i) columns[i] = signed_half(loaded.lane[i / 2] >> (i % 2 * 4));
  }
}

// Thread i of all owns vector i of the output.
template <typename Scale, typename Output, int VEC, int BITS>
__global__ void dequantize_rows_kernel(
    const int8* __restrict__ values_ptr,   // [num_embeddings, D], or [num_embeddings, (D + 1) / 2] of 4 bits
    const Scale* __restrict__ scale_ptr,   // [num_embeddings, groups], contiguous
    const int8* __restrict__ zero_ptr,     // of scale's shape, or null: no zeros
    const void* __restrict__ indices_ptr,  // any integer or float dtype, [num_indices], contiguous
    Output* __restrict__ output_ptr,       // [num_indices, D], contiguous
    int64* record_ptr,                     // [4], or null: do not record
    int32* flag_ptr,                       // [1], pinned host memory, or null
    int64 num_indices,
    int64 num_embeddings,
    int64 D,      // < 2**31
    int64 GROUP,  // columns that share a scale; VEC divides it
    int64 index_kind) {
  using Acc = typename Accumulator<Scale>::type;
  const FlatVector own = flat_vector(D / VEC);
  if (own.n >= num_indices) return;
  const WrappedIndex id = load_wrapped_index(indices_ptr, own.n, index_kind, num_embeddings);
  const int64 d = own.vector * VEC;
  Vector<Output, VEC> output;
  set_zero(output);
  if (id.in_table) {
    int32 columns[VEC];
    load_columns<VEC, BITS>(values_ptr, id.row, d, D, columns);
    const int64 place = id.row * ((D + GROUP - 1) / GROUP) + (uint32)d / (uint32)GROUP;
    const Acc scale = widen(scale_ptr[place]);
    const int32 zero = zero_ptr ? zero_ptr[place] : 0;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const Acc value = (Acc)(columns[i] - zero);
      narrow(zero_ptr ? value * scale : value / scale, output.lane[i]);
    }
  }
  *(Vector<Output, VEC>*)(output_ptr + own.n * D + d) = output;
  if (record_ptr && d == 0 && !id.in_table) {
    record_out_of_range(record_ptr, flag_ptr, own.n, id.index, -num_embeddings);
  }
}
