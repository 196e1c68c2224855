// Take from a table that Keras quantized to 8 or 4 bits: only the rows that are looked up are dequantized.
//
// GROUP columns of a row share a scale and, optionally, a zero point: output = value / scale, or
// (value - zero) * scale. Two 4-bit columns share a byte, the even one in the low nibble. Ids as in take.cu.
//
// FUSED: each group's bytes are its codes, unsigned, its scale and its offset; output = code * scale + offset, a product
// without rounding. Ids as in gather.cu: negative ones are out of range. See gpu_embed/fused_rows.py.

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

// Codes [d, d + VEC) of a group of fused rows.
template <int VEC, int BITS>
__device__ inline void load_codes(const int8* codes_ptr, uint32 d, int32 (&codes)[VEC]) {
  if constexpr (BITS == 8) {
    const auto loaded = *(const Vector<uint8, VEC>*)(codes_ptr + d);
#pragma unroll
    for (int i = 0; i < VEC; ++i) codes[i] = loaded.lane[i];
  } else if constexpr (VEC == 1) {
    codes[0] = ((const uint8*)codes_ptr)[d / 2] >> (d % 2 * 4) & 15;
  } else {
    const auto loaded = *(const Vector<uint8, VEC / 2>*)(codes_ptr + d / 2);
#pragma unroll
    for (int i = 0; i < VEC; ++i) codes[i] = loaded.lane[i / 2] >> (i % 2 * 4) & 15;
  }
}

// grid:  cdiv(num_indices * D / VEC, blockDim.x); block: 1-D
// owner: thread i of the grid: vector i of the flattened output, across row boundaries
// why:   as take_rows_kernel
template <typename Scale, typename Output, int VEC, int BITS, bool FUSED = false>
__global__ void dequantize_rows_kernel(
    const int8* __restrict__ values_ptr,   // [num_embeddings, D], or [num_embeddings, (D + 1) / 2] if 4-bit;
                                           // FUSED: bytes [num_embeddings, groups, bytes of a group]
    const Scale* __restrict__ scale_ptr,   // [num_embeddings, groups], contiguous; FUSED: values_ptr
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
  WrappedIndex id = load_wrapped_index(indices_ptr, own.n, index_kind, num_embeddings);
  if constexpr (FUSED) {
    id.row = id.index;
    id.in_table = names_row(id.row, num_embeddings);
  }
  const int64 d = own.vector * VEC;
  Vector<Output, VEC> output;
  set_zero(output);
  if (id.in_table) {
    int32 columns[VEC];
    const int64 group = id.row * ((D + GROUP - 1) / GROUP) + (uint32)d / (uint32)GROUP;
    if constexpr (FUSED) {
      const int64 group_items = GROUP * BITS / 8 / sizeof(Scale) + 2;
      const Scale* next_ptr = scale_ptr + (group + 1) * group_items;
      load_codes<VEC, BITS>(
          values_ptr + group * group_items * (int64)sizeof(Scale), (uint32)d % (uint32)GROUP, columns);
      const Acc scale = widen(next_ptr[-2]), offset = widen(next_ptr[-1]);
#pragma unroll
      for (int i = 0; i < VEC; ++i) narrow((Acc)columns[i] * scale + offset, output.lane[i]);
    } else {
      load_columns<VEC, BITS>(values_ptr, id.row, d, D, columns);
      const Acc scale = widen(scale_ptr[group]);
      const int32 zero = zero_ptr ? zero_ptr[group] : 0;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const Acc value = (Acc)(columns[i] - zero);
        narrow(zero_ptr ? value * scale : value / scale, output.lane[i]);
      }
    }
  }
  *(Vector<Output, VEC>*)(output_ptr + own.n * D + d) = output;
  if (record_ptr && d == 0 && !id.in_table) {
    const int64 limit = FUSED ? num_embeddings : -num_embeddings;
    record_out_of_range(record_ptr, flag_ptr, own.n, id.index, limit);
  }
}
