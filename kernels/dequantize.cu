// Take from a table that Keras quantized to 8 or 4 bits: only the rows that are looked up are dequantized.
//
// GROUP columns of a row share a scale and, optionally, a zero point: output = value / scale, or
// (value - zero) * scale. Two 4-bit columns share a byte, the even one in the low nibble. Ids as in take.cu.

#include "common.cuh"
#include "wrapped_index.cuh"

// The low nibble, sign-extended.
__device__ inline int32 low_nibble(int32 byte) { return ((byte & 15) ^ 8) - 8; }

// Columns [d, d + VEC) of a row.
template <int VEC, int BITS>
__device__ inline void load_columns(
    const int8* values_ptr, int64 row, int64 d, int64 D, int32 (&columns)[VEC]) {
  if constexpr (BITS == 8) {
    const auto loaded = *(const Vector<int8, VEC>*)(values_ptr + row * D + d);
#pragma unroll
    for (int i = 0; i < VEC; ++i) columns[i] = loaded.lane[i];
  } else if constexpr (VEC == 1) {
    const int32 byte = values_ptr[row * ((D + 1) / 2) + d / 2];
    columns[0] = low_nibble(byte >> (d % 2 * 4));
  } else {
    const auto loaded =
        *(const Vector<int8, VEC / 2>*)(values_ptr + row * ((D + 1) / 2) + d / 2);
#pragma unroll
    for (int i = 0; i < VEC; ++i) columns[i] = low_nibble(loaded.lane[i / 2] >> (i % 2 * 4));
  }
}

// grid:  cdiv(num_indices * D / VEC, blockDim.x); block: 1-D
// owner: thread i of the grid: vector i of the flattened output, across row boundaries
// why:   as take_rows_kernel
template <typename Scale, typename Output, int VEC, int BITS>
__global__ void dequantize_rows_kernel(
    const int8* __restrict__ values_ptr,   // [num_embeddings, D], or [num_embeddings, (D + 1) / 2] if 4-bit
    const Scale* __restrict__ scale_ptr,   // [num_embeddings, groups], contiguous
    const int8* __restrict__ zero_ptr,     // scale's shape; null: no zero points
    const void* __restrict__ indices_ptr,  // any integer or float dtype, [num_indices], contiguous
    Output* __restrict__ output_ptr,       // [num_indices, D], contiguous
    int64* record_ptr,                     // [7]; null: do not record
    int32* flag_ptr,                       // [1], pinned host memory; null: do not record
    int64 num_indices,
    int64 num_embeddings,
    int64 D,      // < 2**31; VEC divides it
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
    const int64 group = id.row * ((D + GROUP - 1) / GROUP) + (uint32)d / (uint32)GROUP;
    const Acc scale = widen(scale_ptr[group]);
    const int32 zero = zero_ptr ? zero_ptr[group] : 0;
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
